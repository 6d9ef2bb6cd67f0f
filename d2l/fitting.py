"""Gradient descent on the LoRA of one document: what a hypernetwork replaces.

Axes: l layers, r rank, i and o a module's widths, b rows, t query tokens, k labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax
from ml_collections import ConfigDict

from hyperlora import objectives
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.lora import Lora, LoraPair
from hyperlora.lora_table import LoraTable
from hyperlora.meta_learning import Learner, TrainState
from hyperlora.models.base import BaseModel
from hyperlora.models.decoder import Decoder


class Fitter:
    """Trains LoRAs, one at a time, by the step of the meta-learning loop; shapes compile once."""

    def __init__(self, base: BaseModel, objective: ConfigDict, learning_rate: float):
        """
        Args:
          objective: see `objectives.build`.
          learning_rate: of Adam, constant.

        Raises:
          UserError: unknown objective.
        """
        self.base = base
        self._objective = objectives.build(objective)
        self._optimizer = optax.adam(learning_rate)
        self._steps: dict[Any, Any] = {}

    def _step(self, dims: tuple[tuple[str, int, int], ...], rank: int, scaling: float):
        """The jitted step for LoRAs of a shape."""
        if (dims, rank, scaling) in self._steps:
            return self._steps[dims, rank, scaling]
        module = LoraTable(self.base.config.num_layers, dims, rank, scaling, entries=1)
        table = Hypernetwork(module, self.base, lambda _, context: (context['task'], None), {})
        learner = Learner(table, Decoder(self.base.config), self._objective, 1, self._optimizer)
        step = jax.jit(learner.step, donate_argnums=0)
        self._steps[dims, rank, scaling] = step
        return step

    def __call__(
        self, start: Lora, query: dict[str, np.ndarray], steps: Sequence[int]
    ) -> Iterator[Lora]:
        """The LoRA after each of some numbers of steps, ascending.

        Args:
          start: of one row.
          query: rows to learn, the same in each step; see `Learner.loss`. Chunk weights are added.
        """
        dims = tuple(
            (name, pair.a.shape[-1], pair.b.shape[-1]) for name, pair in start.pairs.items()
        )
        step = self._step(dims, start.rank, float(start.scaling))
        params: Any = {}
        for name, pair in start.pairs.items():
            # Copies: the step gives their memory to the next state.
            params |= {f'a_{name}': pair.a.copy(), f'b_{name}': pair.b.copy()}
        state = TrainState(jax.numpy.int32(0), params, self._optimizer.init(params))
        rows = len(query['tokens'])
        query = {**query, 'chunk_weights': np.ones((rows, 1), np.float32)}
        batch = {'context': {'task': np.zeros(1, np.int32)}, 'query': query}
        batch = jax.tree.map(lambda x: x[None], batch)
        done = 0
        for until in steps:
            for _ in range(until - done):
                state, _ = step(state, {'base': self.base.params}, batch)
            done = until
            pairs = {
                name: LoraPair(state.params[f'a_{name}'].copy(), state.params[f'b_{name}'].copy())
                for name in start.pairs
            }
            yield jax.block_until_ready(start.replace(pairs=pairs))


def text_rows(tokens: Sequence[int], length: int) -> dict[str, np.ndarray]:
    """A text as rows of at most `length` tokens, each of which is to be predicted from those
    before it: tokens `[b, t]`, labels, label_positions and label_weights `[b, k]`, k = t.

    Rows overlap by one token, so that every token but the first is a label once.
    """
    starts = range(0, max(len(tokens) - 1, 1), length)
    parts = [list(tokens[start : start + length + 1]) for start in starts]
    rows = {key: np.zeros((len(parts), length), np.int32) for key in ('tokens', 'labels')}
    weights = np.zeros((len(parts), length), np.float32)
    for row, part in enumerate(parts):
        count = len(part) - 1
        rows['tokens'][row, :count], rows['labels'][row, :count] = part[:-1], part[1:]
        weights[row, :count] = 1
    positions = np.tile(np.arange(length, dtype=np.int32), (len(parts), 1))
    return {**rows, 'label_positions': positions, 'label_weights': weights}
