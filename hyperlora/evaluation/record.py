"""metrics.json of an evaluation: written after every part, so that an evaluation can go on."""

from __future__ import annotations

import hashlib
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from hyperlora.errors import UserError


def digest(tree: Any) -> str:
    """Tells the weights of two steps of a training apart, or the texts of two collections."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()[:16]


def resume(
    path: pathlib.Path,
    config: ConfigDict,
    fresh: dict[str, Any],
    free: Sequence[str] = (),
    **settings: Any,
) -> dict[str, Any]:
    """The metrics so far; `fresh` if there are none, beside `settings`.

    Args:
      config: all of it is in `settings`, which must not change.
      free: but these keys, which may.
      settings: more of them, or in place of the config's.

    Raises:
      UserError: the file is damaged, or of an evaluation with other settings.
    """
    settings = {k: v for k, v in {**config.to_dict(), **settings}.items() if k not in free}
    settings = json.loads(json.dumps(settings))  # as the file gives them back
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
        changes = [
            f'{key}: {found["settings"][key]} -> {value}'
            for key, value in settings.items()
            if found['settings'][key] != value
        ]
    except FileNotFoundError:
        return {'settings': settings, **fresh}
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'{path} is not that of this evaluation ({e!r}); use another workdir'
        ) from e
    if changes:
        raise UserError(
            f'{path} is of an evaluation with other settings ({", ".join(changes)}); '
            'use another workdir'
        )
    return found


def write(path: pathlib.Path, metrics: dict[str, Any]) -> None:
    """Replaces the file at once.

    Raises:
      UserError: it cannot be written, for want of room or rights; what was there is kept.
    """
    partial = path.with_suffix('.partial')
    try:
        partial.write_text(json.dumps(metrics, indent=2) + '\n', encoding='utf-8')
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(
            f'{path}: cannot write ({error.strerror}): make room there, then start again'
        ) from error
