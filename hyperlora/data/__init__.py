"""Input pipelines: grain datasets of training steps, deterministic from (seed, step)."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import grain
import jax
from ml_collections import ConfigDict

from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel

# Each has `build`, and `example`: one of the largest groups of a batch, its labels made up.
_MODULES = {
    'niah': 'd2l.niah',
    'reconstruction': 't2l.reconstruction',
    'tasks': 't2l.data',
}


def build(
    config: ConfigDict, base: BaseModel, encoder: Any, seed: int, groups: int, accumulate: int
) -> grain.MapDataset:
    """The data set `config.name`; item i is the batch of step i.

    Args:
      base: the model that answers queries.
      encoder: what reads contexts; see `Hypernetwork`.
      groups: packed rows per microbatch, one per data shard of the mesh.
      accumulate: microbatches per step.

    Returns:
      Dataset of batches {'context', 'query' or 'target'} (see `meta_learning.Learner.loss`),
      every leaf `[accumulate, ...]`.

    Raises:
      UserError: no data set of that name.
    """
    return _module(config).build(config, base, encoder, seed, groups, accumulate)


def abstract(
    config: ConfigDict, base: BaseModel, encoder: Any, groups: int, accumulate: int
) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of the largest batch of the data set; arguments and errors as for `build`.

    Neither texts nor weights are read, but for the tokenizers of `base` and `encoder`.
    """
    example = _module(config).example(config, base, encoder)

    def leaf(x):
        return jax.ShapeDtypeStruct((accumulate, groups * x.shape[0], *x.shape[1:]), x.dtype)

    return jax.tree.map(leaf, example)


def _module(config: ConfigDict) -> ModuleType:
    if config.name not in _MODULES:
        raise UserError(f'unknown data {config.name!r}; known: {", ".join(_MODULES)}')
    return importlib.import_module(_MODULES[config.name])
