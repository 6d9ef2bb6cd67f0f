"""Input pipelines: grain datasets of training steps, deterministic from (seed, step)."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import grain
import jax
import numpy as np
from ml_collections import ConfigDict

from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel

# Each has `build`: (config, base, encoder, seed, groups per step) -> random-access source. Its item
# is a group, one packed row: {'context', 'query' or 'target'} of arrays `[rows, ...]`. It follows
# from (seed, index) alone, and shapes are the same within a step. And `example`: (config, base,
# encoder) -> one of the largest groups, its labels made up.
_MODULES = {
    'captions': 'd2l.captions',
    'documents': 'd2l.document_groups',
    'niah': 'd2l.niah',
    'readings': 'd2l.reading',
    'reconstruction': 't2l.reconstruction',
    'tasks': 't2l.data',
}


@dataclasses.dataclass(frozen=True)
class Steps:
    """Random access to batches: item i is that of step i, as far as this process builds it.

    Attributes:
      source: of groups, in the order of steps, microbatches and places in a microbatch.
      groups: of a microbatch, of all processes together.
      accumulate: microbatches per step.
      own: the places in a microbatch that this process fills.
    """

    source: Sequence[Any]
    groups: int
    accumulate: int
    own: Sequence[int]

    def __len__(self) -> int:
        return len(self.source) // (self.groups * self.accumulate)

    def __getitem__(self, step: int) -> Any:
        first = step * self.accumulate * self.groups
        items = [
            self.source[first + microbatch * self.groups + place]
            for microbatch in range(self.accumulate)
            for place in self.own
        ]

        def stack(*rows):
            x = np.concatenate(rows)
            return x.reshape(self.accumulate, -1, *x.shape[1:])

        return jax.tree.map(stack, *items)


def build(
    config: ConfigDict,
    base: BaseModel,
    encoder: Any,
    seed: int,
    groups: int,
    accumulate: int,
    own: Sequence[int] | None = None,
) -> grain.MapDataset:
    """The data set `config.name`; item i is the batch of step i, however many processes there are.

    Args:
      base: the model that answers queries.
      encoder: what reads contexts; see `Hypernetwork`.
      groups: packed rows per microbatch, of all processes together.
      accumulate: microbatches per step.
      own: which groups of a microbatch to build, see `sharding.own_groups`; None for all.

    Returns:
      Dataset of batches {'context', 'query' or 'target'} (see `meta_learning.Learner.loss`),
      every leaf `[accumulate, ...]`.

    Raises:
      UserError: no data set of that name.
    """
    source = _module(config).build(config, base, encoder, seed, groups * accumulate)
    own = range(groups) if own is None else own
    return grain.MapDataset.source(Steps(source, groups, accumulate, own))


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
