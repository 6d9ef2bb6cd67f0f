"""What a config names as a source of data, bound to the function that reads it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from hyperlora.errors import UserError


def bind(
    readers: Mapping[str, Callable[..., Any]], source: Mapping[str, Any], kind: str
) -> Callable[[], Any]:
    """The reader of a source {reader, and its arguments}, ready to be called.

    Args:
      readers: those that there are, by name.
      kind: what they read, in the plural.

    Raises:
      UserError: unknown reader or argument.
    """
    arguments = dict(source)
    name = arguments.pop('reader', None)
    if name not in readers:
        raise UserError(f'unknown reader of {kind} {name!r}; known: {", ".join(readers)}')
    try:
        inspect.signature(readers[name]).bind(**arguments)
    except TypeError as error:
        raise UserError(f'arguments of the reader {name!r} of {kind}: {error}') from error
    return functools.partial(readers[name], **arguments)
