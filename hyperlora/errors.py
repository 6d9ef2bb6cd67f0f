"""The exception for mistakes of the user."""


class UserError(Exception):
    """A mistake the user can mend: shown as one line, exit code 2."""
