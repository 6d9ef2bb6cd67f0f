"""The exceptions that a command shows as one line."""

from collections.abc import Sequence


class UserError(Exception):
    """A mistake the user can mend; exit code 2."""


class Outage(Exception):
    """What lies outside this program and may have passed when it is started again, such as a bucket
    that cannot be written to; exit code 1, after which launchers do start again."""


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of many names, and how many more there are."""
    more = f' and {len(names) - most} more' if len(names) > most else ''
    return ', '.join(names[:most]) + more
