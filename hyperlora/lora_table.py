"""A table of plain LoRAs, as a hypernetwork that looks its task up instead of reading about it.

One entry is a multi-task LoRA; as many entries as tasks are a LoRA per task, the oracle that
Text-to-LoRA is measured against. So both baselines train in the one meta-learning loop, on the same
batches.

Entries may share what they can be made of: each is then a code, and a sum of a few LoRAs of all
tasks, weighted by it. So they are learned as fast, in fewer parameters, and a hypernetwork whose
heads are as wide can reconstruct them exactly.

Axes: n contexts, l layers, e entries, d width of the codes, r rank, i and o a module's widths.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.lora import Lora, LoraPair
from hyperlora.models.base import BaseModel
from hyperlora.trained import Trained


class LoraTable(nn.Module):
    """Numbers of tasks -> their LoRAs.

    Attributes:
      num_layers: l.
      dims: (module, i, o) of every adapted module.
      rank: r.
      scaling: multiplies every delta.
      entries: e; numbers beyond it share the last entry.
      codes: d; 0 for entries that share nothing.
    """

    num_layers: int
    dims: tuple[tuple[str, int, int], ...]
    rank: int
    scaling: float
    entries: int
    codes: int = 0

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None) -> tuple[Lora, None]:
        """`features [n]` int32 -> a Lora of n rows. A fresh one leaves the base as it is: A is
        uniform within 1 / sqrt(i), as PEFT starts it, and B zero. All entries start alike: LoRAs
        with a start of their own have no common basis, and no hypernetwork can reconstruct noise.
        """
        rows = jnp.minimum(features, self.entries - 1)
        zeros = nn.initializers.zeros
        if self.codes:
            # Small, so that a step of the optimizer moves an entry as far as one of its own.
            init = nn.with_logical_partitioning(nn.initializers.normal(0.1), (None, None))
            codes = self.param('codes', init, (self.entries, self.codes))[rows]
        pairs = {}
        for name, i, o in self.dims:

            def factor(key, init, width, name=name):
                def weights(name, init, count):
                    return self.param(
                        name,
                        nn.with_logical_partitioning(init, ('layers', None, None, 'lora')),
                        (self.num_layers, count, self.rank, width),
                    )

                name = f'{key}_{name}'
                if not self.codes:
                    return weights(name, init, self.entries)[:, rows]
                return _decoded(
                    codes, weights(name, init, 1), weights(f'head_{name}', zeros, self.codes)
                )

            def uniform(key, shape, i=i):
                one = (shape[0], 1, *shape[2:])
                return jnp.broadcast_to(jax.random.uniform(key, one, minval=-1) / i**0.5, shape)

            pairs[name] = LoraPair(factor('a', uniform, i), factor('b', zeros, o))
        return Lora(pairs, jnp.float32(self.scaling)), None


def _decoded(codes: jax.Array, bias: jax.Array, head: jax.Array) -> jax.Array:
    """Codes `[n, d]`, `[l, 1, r, i]` and `[l, d, r, i]` -> `[l, n, r, i]`."""
    return bias + jnp.einsum('nd,ldri->lnri', codes, head)


def build(config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh | None) -> Hypernetwork:
    """Builds the table. Its contexts are numbers of tasks: `{'task': [n]}`.

    Raises:
      UserError: unknown target module.
    """
    module = LoraTable(
        base.config.num_layers, lora.module_dims(base.config, config.modules), **config.shape
    )

    def encode(_, context):
        return context['task'], None

    return Hypernetwork(module, base, encode, {'task': np.zeros(1, np.int32)})


def factors(params: Any) -> dict[str, np.ndarray]:
    """Of the parameters of a table: a_MODULE `[l, e, r, i]`, b_MODULE `[l, e, r, o]`."""
    if 'codes' not in params:
        return {name: np.asarray(x) for name, x in params.items()}
    return {
        name: np.asarray(_decoded(params['codes'], x, params[f'head_{name}']))
        for name, x in params.items()
        if f'head_{name}' in params
    }


def single(table: Trained) -> Lora:
    """The only entry of a trained table, one row.

    Raises:
      UserError: not a table, or one of several entries.
    """
    count = table.require('lora_table').config.hypernetwork.shape.entries
    if count != 1:
        raise UserError(f'the checkpoint has {count} LoRAs; one for all texts is needed here')
    return entries(table, 0)


def entries(table: Trained, *numbers: int) -> Lora:
    """Entries of a trained table as a Lora, one row each."""
    return table.hypernetwork.generate(table.params, None, {'task': np.asarray(numbers, np.int32)})[
        0
    ]
