"""ml_collections configurations, one file per experiment."""

from hyperlora.errors import UserError


def fields(argument: str) -> list[str]:
    """Variant, data and start of `FILE.py:VARIANT,DATA,START`; those left out are empty.

    Raises:
      UserError: there are more.
    """
    found = argument.split(',')
    if len(found) > 3:
        raise UserError(f'at most 3 fields may follow the config, not {argument!r}')
    return found + [''] * (3 - len(found))
