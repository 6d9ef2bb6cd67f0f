"""Input pipelines: grain datasets of training steps, deterministic from (seed, step)."""

from __future__ import annotations

import importlib
from typing import Any

import grain
from ml_collections import ConfigDict

from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel

_BUILDERS = {
    'documents': 'd2l.docs:build',
    'niah': 'd2l.niah:build',
    'reconstruction': 't2l.reconstruction:build',
    'tasks': 't2l.data:build',
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
    if config.name not in _BUILDERS:
        raise UserError(f'unknown data {config.name!r}; known: {", ".join(_BUILDERS)}')
    module, function = _BUILDERS[config.name].split(':')
    return getattr(importlib.import_module(module), function)(
        config, base, encoder, seed, groups, accumulate
    )
