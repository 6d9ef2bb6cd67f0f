"""ml_collections configurations, one file per experiment."""

from hyperlora.errors import UserError


def fields(argument: str, count: int) -> list[str]:
    """The fields of `FILE.py:FIELD,FIELD,...`, filled up with empty ones.

    Raises:
      UserError: there are more than `count`.
    """
    found = argument.split(',')
    if len(found) > count:
        raise UserError(f'at most {count} fields may follow the config, not {argument!r}')
    return found + [''] * (count - len(found))
