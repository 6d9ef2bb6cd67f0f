"""The methods that an evaluation compares: those of a class, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hyperlora.errors import UserError


def public(methods: type) -> dict[str, Callable[..., Any]]:
    """Name -> method, of all whose names do not begin with an underscore."""
    return {
        name: method
        for name, method in vars(methods).items()
        if callable(method) and not name.startswith('_')
    }


def methods_of(chosen: Iterable[str], known: Mapping[str, Any]) -> list[str]:
    """The names of methods that a config chooses; the command line gives several as one text, with
    commas between.

    Raises:
      UserError: none, or there is no such method.
    """
    names = [name for text in chosen for name in text.split(',') if name]
    if not names:
        raise UserError(f'no methods are chosen; known: {", ".join(known)}')
    if unknown := set(names) - known.keys():
        raise UserError(f'unknown methods {", ".join(sorted(unknown))}; known: {", ".join(known)}')
    return names
