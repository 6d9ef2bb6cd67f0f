"""The exceptions that a command shows as one line."""


class UserError(Exception):
    """A mistake the user can mend; exit code 2."""


class Outage(Exception):
    """What lies outside this program and may have passed when it is started again, such as a bucket
    that cannot be written to; exit code 1, after which launchers do start again."""
