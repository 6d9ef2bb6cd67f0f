"""Descriptions of tasks -> LoRAs.

Axes: n descriptions.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from hyperlora.lora import Lora
from hyperlora.trained import Trained


class Specializer:
    """Turns descriptions into LoRAs, many in one call."""

    def __init__(self, trained: Trained):
        """Raises UserError if the checkpoint does not read descriptions."""
        trained.require_contexts('embedding')
        self.trained = trained
        self._generate = jax.jit(trained.hypernetwork.generate)

    def __call__(self, descriptions: Sequence[str]) -> Lora:
        """A Lora of n rows.

        Raises:
          UserError: a description is empty or too long; see `Embedder`.
        """
        return self.from_embeddings(self.trained.hypernetwork.encoder(descriptions))

    def from_embeddings(self, embeddings: np.ndarray) -> Lora:
        """A Lora of n rows, of embeddings `[n, e]`. Counts are padded to powers of two, so that
        few shapes are compiled."""
        count = len(embeddings)
        padded = np.zeros((1 << (count - 1).bit_length(), embeddings.shape[1]), np.float32)
        padded[:count] = embeddings
        lora, _ = self._generate(self.trained.params, None, {'embedding': padded})
        return lora.replace(pairs=jax.tree.map(lambda x: x[:, :count], lora.pairs))
