"""What a config names as a source of data, read by the function that it names."""

from __future__ import annotations

import inspect
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hyperlora.errors import UserError


def read(
    readers: Mapping[str, Callable[..., Iterable[Any]]], source: Mapping[str, Any], kind: str
) -> list[Any]:
    """What the reader of a source {reader, and its arguments} finds.

    Args:
      readers: those that there are, by name.
      kind: what they read, in the plural; so the extra is called that holds their libraries.

    Raises:
      UserError: unknown reader or argument, a library that is missing, or what the reader finds
        wrong.
    """
    arguments = dict(source)
    name = arguments.pop('reader', None)
    if name not in readers:
        raise UserError(f'unknown reader of {kind} {name!r}; known: {", ".join(readers)}')
    try:
        inspect.signature(readers[name]).bind(**arguments)
    except TypeError as error:
        raise UserError(f'arguments of the reader {name!r} of {kind}: {error}') from error
    try:
        return list(readers[name](**arguments))
    except ImportError as error:
        raise UserError(
            f'{name} {kind} need {error.name}: pip install "hyperlora[{kind}]"'
        ) from error


def tfds_source(name: str, split: str, data_dir: str | None) -> Sequence[Any]:
    """The records of a TFDS data set.

    Args:
      name: of a data set, or the folder of one that is prepared.

    Raises:
      UserError: not there.
    """
    import tensorflow_datasets as tfds  # slow to import

    try:
        folder = pathlib.Path(name).expanduser()
        if (folder / 'dataset_info.json').is_file():
            return tfds.builder_from_directory(folder).as_data_source(split)
        return tfds.data_source(name, split=split, data_dir=data_dir)
    except Exception as error:  # whatever a builder raises where it is not prepared
        raise UserError(
            f'cannot read the TFDS data set {name!r}, split {split!r}: {error}'
        ) from error
