"""What a config names as a source of data, bound to the function that reads it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
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


def tfds_source(name: str, split: str, data_dir: str | None) -> Sequence[Any]:
    """The records of a TFDS data set.

    Raises:
      UserError: not there.
    """
    import tensorflow_datasets as tfds  # slow to import

    try:
        return tfds.data_source(name, split=split, data_dir=data_dir)
    except Exception as error:  # whatever a builder raises where it is not prepared
        raise UserError(
            f'cannot read the TFDS data set {name!r}, split {split!r}: {error}'
        ) from error
