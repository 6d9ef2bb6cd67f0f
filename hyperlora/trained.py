"""Trained hypernetworks: found by name, export or training folder, with their base model."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from etils import epath
from ml_collections import ConfigDict

from hyperlora import checkpointing, hypernetwork
from hyperlora.errors import UserError, some
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models.base import BaseModel, load_base

PRETRAINED = pathlib.Path(__file__).parent / 'pretrained'


@dataclasses.dataclass(frozen=True)
class Trained:
    """A hypernetwork ready for use.

    Attributes:
      config: the experiment's config.
      base: the model that its LoRAs are for.
      hypernetwork: context -> Lora.
      params: the trained parameters, f32.
    """

    config: ConfigDict
    base: BaseModel
    hypernetwork: Hypernetwork
    params: Any

    def require(self, *names: str) -> Trained:
        """This, unless it is a hypernetwork of another kind.

        Raises:
          UserError: it is none of `names`.
        """
        found = self.config.hypernetwork.name
        if found not in names:
            raise UserError(f'the checkpoint is a {found}; a {" or ".join(names)} is needed here')
        return self

    def require_contexts(self, *keys: str) -> Trained:
        """This, unless its contexts are of another kind; see `Hypernetwork.example`.

        Raises:
          UserError: they are not made of `keys`.
        """
        found = self.hypernetwork.example.keys()
        if found != set(keys):
            raise UserError(
                f'the checkpoint is a {self.config.hypernetwork.name}, which reads '
                f'{", ".join(sorted(found))}; one that reads {", ".join(keys)} is needed here'
            )
        return self


def load(
    checkpoint: str, base: BaseModel | None = None, quantization: str | None = None
) -> Trained:
    """Loads a checkpoint.

    Args:
      checkpoint: name of shipped weights (a folder of hyperlora/pretrained), a folder that
        `launch.export` wrote, or the workdir of a training, which may be a gs:// URL.
      base: the base model, if it is loaded already.
      quantization: of the base model, see `load_base`; None for that of the training.

    Raises:
      UserError: unknown name, damaged or foreign files, or another base model than the one that
        the checkpoint was trained with.
    """
    folder, params, meta = read(checkpoint)
    with _foreign(folder):
        config, fingerprint = ConfigDict(meta['config']), meta['base_fingerprint']
        encoder_fingerprint = meta['encoder_fingerprint']
        named = config.base, config.base_dtype, None, quantization or config.base_quantization
        flat = flax.traverse_util.flatten_dict(config.to_dict(), sep='.')
    for key in checkpointing.PLACES:
        place = str(flat.get(key) or '')
        if os.sep in place and not os.path.exists(place) and not (key == 'base' and base):
            raise UserError(
                f'{folder} was trained with {place}, which is not there: if it has moved, write '
                f'the checkpoint with launch.export and say where as {key} of its config.json'
            )
    base = base or load_base(*named)
    if fingerprint != base.fingerprint:
        raise UserError(
            f'{folder} was trained for base model {fingerprint} '
            f'({config.base}), not for {base.fingerprint} ({base.name})'
        )
    with _foreign(folder):
        built = hypernetwork.build(config.hypernetwork, base)
    if encoder_fingerprint != built.encoder.fingerprint:
        raise UserError(
            f'{folder} was trained with the encoder {encoder_fingerprint}, not with '
            f'{built.encoder.fingerprint} ({built.encoder.name})'
        )
    with _foreign(folder):
        expected = jax.eval_shape(
            lambda frozen: nn.unbox(built.init(jax.random.key(0), frozen)), built.encoder.params
        )
    check_fit(folder, expected, params)
    return Trained(config, base, built, jax.tree.map(jnp.asarray, params))


@contextlib.contextmanager
def _foreign(folder: pathlib.Path):
    """What a config lacks, or has otherwise, is the user's mistake."""
    try:
        yield
    except (KeyError, AttributeError, TypeError, ValueError, ZeroDivisionError) as e:
        raise UserError(f'the config of {folder} is not that of a hypernetwork ({e})') from e


def read(checkpoint: str) -> tuple[pathlib.Path, Any, dict]:
    """(folder, parameters, record) of a checkpoint; see `load`."""
    names = sorted(p.name for p in PRETRAINED.glob('*') if p.is_dir())
    folder = PRETRAINED / checkpoint
    if checkpoint not in names:
        folder = epath.Path(checkpoint).expanduser()
    if (folder / 'checkpoints').is_dir():
        return folder, *checkpointing.load_params((folder / 'checkpoints').resolve())
    if (folder / 'config.json').is_file():
        return folder, *checkpointing.load_export(folder)
    raise UserError(
        f'unknown checkpoint {checkpoint!r}: neither shipped weights '
        f'({", ".join(names) or "none"}) nor a folder that holds a checkpoint'
    )


def check_fit(folder: pathlib.Path, expected: Any, found: Any) -> None:
    """Raises UserError unless two trees of parameters agree in names and shapes."""
    if wrong := differences(expected, found):
        raise UserError(
            f'{folder}: the tensors do not fit the config: {some(wrong)}; choose weights of the '
            'same hypernetwork'
        )


def differences(expected: Any, found: Any) -> list[str]:
    """What is missing, extra or misshapen among the leaves of a tree of parameters."""

    def flat(tree):
        return {
            jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    a, b = flat(expected), flat(found)
    return (
        [f'{name} is missing' for name in sorted(a.keys() - b.keys())]
        + [f'{name} is unknown' for name in sorted(b.keys() - a.keys())]
        + [
            f'{name} is {b[name]}, not {a[name]}'
            for name in sorted(a.keys() & b.keys())
            if a[name] != b[name]
        ]
    )
