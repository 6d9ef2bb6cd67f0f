"""The Text-to-LoRA hypernetwork: embeddings of task descriptions -> a `Lora`.

Axes: n descriptions, e embedding width, l layers, m modules, f factors (A and B), r rank, d latent
width, i and o a module's widths.

Source: Text-to-LoRA (arXiv 2506.06105), section 3 and appendix.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora.errors import UserError
from hyperlora.layers import PerLayerDense, dense
from hyperlora.lora import Lora, LoraPair
from hyperlora.models.decoder import rotate
from t2l.task_encoders import TASK_ENCODERS

_DROPOUT = 0.05
_ROPE_BASE = 1e4


@dataclasses.dataclass(frozen=True)
class TextToLoraConfig:
    """Shape of the hypernetwork.

    The paper's sizes: L is `shared_head=False, per_rank=False`, M is `shared_head=True,
    per_rank=False`, S is `shared_head=True, per_rank=True`.

    Attributes:
      num_layers: l, layers of the base model.
      dims: (module, i, o) of every adapted module, sorted by name.
      rank: r.
      scaling: multiplies every delta; the original uses lora_alpha / sqrt(r).
      embedding_width: e.
      latent_size: half of it is the task's, a quarter the layer's, a quarter the module's.
      head_width: width that the heads read.
      encoder: key of `TASK_ENCODERS`. With `discrete`, layers and modules are one-hot as well.
      shared_head: one head makes A or B of a module, as a learned embedding asks; otherwise it
        makes both at once.
      per_rank: the heads make one rank at a time, told apart by their position.
      learned_positions: those positions are learned rather than rotary.
      per_layer_heads: each layer of the base model has heads of its own, as in Doc-to-LoRA; what
        they read may be negative. Not in the paper, where all layers share a head, and so the
        `head_width` directions that their LoRAs may take: with own heads a thirtieth of the width
        does for 30 layers. Such heads can start as those of a `LoraTable` with codes.
      head_init: `lora`: heads start at a fresh LoRA, the same for all tasks and layers (the
        bias-HyperInit of Beck et al., 2023). `zero`: they start at nothing, for training on top of
        an offset. `random`: PyTorch's start, for reconstruction.
      offset: whether a multi-task LoRA is added to the generated factors.
      learn_offset: whether that LoRA trains.
      z_score: whether the heads make z-scores of A and B, which the statistics of the targets of
        reconstruction turn into A and B. The heads have no bias then.
      output_scale: multiplies A and B; 1 / sqrt(10,000) after reconstruction of delta W.
    """

    num_layers: int
    dims: tuple[tuple[str, int, int], ...]
    rank: int
    scaling: float
    embedding_width: int
    latent_size: int
    head_width: int
    encoder: str = 'linear'
    shared_head: bool = False
    per_rank: bool = False
    learned_positions: bool = False
    per_layer_heads: bool = False
    head_init: str = 'lora'
    offset: bool = False
    learn_offset: bool = False
    z_score: bool = False
    output_scale: float = 1.0


class TextToLora(nn.Module):
    """Task embeddings -> one LoRA each. Dropout is on when a `dropout` key is given."""

    config: TextToLoraConfig

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array | None = None) -> tuple[Lora, None]:
        """Generates LoRAs in one forward pass.

        Args:
          features: `[n, e]`, embeddings of the descriptions.
          mask: not used; what other hypernetworks take.

        Returns:
          A Lora of n rows, and None for the LoRA that all rows share.
        """
        c = self.config
        count = features.shape[0]
        x = self._mix(features)  # [n, l, m, d]
        width = x.shape[-1]
        x = _ResidualMlp(name='mlp1')(x)
        mlp2 = _ResidualMlp(name='mlp2')
        x = x[..., None, :]
        if c.shared_head:
            factors = self._embedding('factors', (len(c.dims), 2), width, (None, None))
            x = mlp2(x + factors)
        x = x[..., None, :]  # [n, l, m, f, r or 1, d]
        if c.per_rank and c.learned_positions:
            positions = self._embedding('positions', (c.rank,), width, (None,))
            x = x + mlp2(positions) if c.shared_head else mlp2(x + positions)
        elif c.per_rank:
            x = mlp2(_rotate_ranks(x, c.rank))
        elif not c.shared_head:
            x = mlp2(x)
        x = nn.LayerNorm(epsilon=1e-5, name='norm')(x)
        x = nn.silu(dense(4 * width, ('latent', 'mlp'), 'mlp3_up', use_bias=True)(x))
        x = _dropout(self, x)
        x = dense(c.head_width, ('mlp', 'latent'), 'mlp3_down', use_bias=True)(x)
        if not c.per_layer_heads:
            x = nn.silu(x)

        pairs = {}
        for m, (name, i, o) in enumerate(c.dims):
            flat = self._head(name, i, o, x[:, :, m])  # [n, l, f or 1, r or 1, outputs]
            if c.shared_head:
                flat = flat.reshape(count, c.num_layers, 2, c.rank, -1)
                a, b = flat[:, :, 0, :, :i], flat[:, :, 1, :, :o]
            elif c.per_rank:
                a, b = flat[:, :, 0, :, :i], flat[:, :, 0, :, i:]
            else:
                flat = flat.reshape(count, c.num_layers, -1)
                a = flat[..., : c.rank * i].reshape(count, c.num_layers, c.rank, i)
                b = flat[..., c.rank * i :].reshape(count, c.num_layers, c.rank, o)
            pair = LoraPair(*(x.swapaxes(0, 1) * c.output_scale for x in (a, b)))
            pairs[name] = self._raw(name, i, o, pair)
        return Lora(pairs, jnp.float32(c.scaling)), None

    def _mix(self, features: jax.Array) -> jax.Array:
        """Task, layer and module as one vector, `[n, l, m, d]`."""
        c = self.config
        if c.encoder not in TASK_ENCODERS:
            raise UserError(
                f'unknown task encoder {c.encoder!r}; known: {", ".join(TASK_ENCODERS)}'
            )
        task = TASK_ENCODERS[c.encoder](c.latent_size // 2, name='task_encoder')(features)
        if c.encoder == 'discrete':
            depth, kind = jnp.eye(c.num_layers), jnp.eye(len(c.dims))
        else:
            quarter = c.latent_size // 4
            depth = self._embedding('layer_depth', (c.num_layers,), quarter, ('layers',))
            kind = self._embedding('module_type', (len(c.dims),), quarter, (None,))
        shape = (features.shape[0], c.num_layers, len(c.dims))
        parts = (task[:, None, None], depth[None, :, None], kind[None, None])
        x = jnp.concatenate([jnp.broadcast_to(p, (*shape, p.shape[-1])) for p in parts], -1)
        width = x.shape[-1]
        if c.per_rank and not c.learned_positions and width % 2:
            raise UserError(
                f'positions of ranks rotate pairs of numbers, but the latent width is {width}: set '
                'hypernetwork.shape.learned_positions, or another number of target modules'
            )
        x = dense(4 * width, ('latent', 'mlp'), 'mixer_up', use_bias=True)(_dropout(self, x))
        x = dense(width, ('mlp', 'latent'), 'mixer_down', use_bias=True)(_dropout(self, nn.silu(x)))
        return _dropout(self, nn.silu(x))

    def _embedding(self, name: str, shape: tuple[int, ...], width: int, axes) -> jax.Array:
        """Learned vectors under a LayerNorm, `[*shape, width]`."""
        init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (*axes, 'norm'))
        table = self.param(name, init, (*shape, width))
        return nn.LayerNorm(epsilon=1e-5, name=f'{name}_norm')(table)

    def _head(self, name: str, i: int, o: int, x: jax.Array) -> jax.Array:
        """The linear map to A and B of a module, `[n, l, ..., d]` -> `[n, l, ..., outputs]`."""
        c = self.config
        outputs = (max(i, o) if c.shared_head else i + o) * (1 if c.per_rank else c.rank)
        # So that the delta's gradient is of the size it has for a plain LoRA.
        shrink = (2 if c.shared_head else 1) * (c.rank if c.per_rank else 1)

        def fresh_lora(key, shape, dtype=jnp.float32):
            # PEFT's start: A uniform, B zero. Where one bias serves both, or all ranks, it fills
            # B as well (as in the original).
            whole = jax.random.uniform(key, shape, dtype, -1, 1) / i**0.5
            if c.shared_head or c.per_rank:
                return whole / shrink**0.5
            return jnp.where(jnp.arange(outputs) < c.rank * i, whole, 0)

        if c.head_init not in ('lora', 'zero', 'random'):
            raise UserError(f'unknown head_init {c.head_init!r}; known: lora, zero, random')
        zeros = nn.initializers.zeros
        settings = {
            'use_bias': c.head_init == 'lora' or (c.head_init == 'random' and not c.z_score),
            'kernel_init': None if c.head_init == 'random' else zeros,
            'bias_init': fresh_lora if c.head_init == 'lora' else zeros,
        }
        axes = 'latent', 'lora'
        if not c.per_layer_heads:
            return dense(outputs, axes, f'head_{name}', **settings)(x)
        return PerLayerDense(outputs, axes, name=f'head_{name}', **settings)(
            x.swapaxes(0, 1)
        ).swapaxes(0, 1)

    def _raw(self, name: str, i: int, o: int, pair: LoraPair) -> LoraPair:
        """Undoes z-scores and adds the multi-task LoRA."""
        c = self.config

        def constants(kind, init, trains):
            def one(factor, width):
                value = self.param(
                    f'{kind}_{factor}_{name}',
                    nn.with_logical_partitioning(init, ('layers', None, 'lora')),
                    (c.num_layers, c.rank, width),
                )[:, None]
                return value if trains else jax.lax.stop_gradient(value)

            return LoraPair(one('a', i), one('b', o))

        if c.z_score:
            mean = constants('mean', nn.initializers.zeros, False)
            deviation = constants('deviation', nn.initializers.ones, False)
            pair = jax.tree.map(lambda x, d, m: x * (d + 1e-10) + m, pair, deviation, mean)
        if c.offset:
            offset = constants('offset', nn.initializers.zeros, c.learn_offset)
            pair = jax.tree.map(jnp.add, pair, offset)
        return pair


class _ResidualMlp(nn.Module):
    """`x + silu(W2 silu(W1 LN(x)))`, inner width 4 d."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(epsilon=1e-5, name='norm')(x)
        y = nn.silu(dense(4 * width, ('latent', 'mlp'), 'up', use_bias=True)(y))
        y = dense(width, ('mlp', 'latent'), 'down', use_bias=True)(_dropout(self, y))
        return x + _dropout(self, nn.silu(y))


def _dropout(module: nn.Module, x: jax.Array) -> jax.Array:
    return nn.Dropout(_DROPOUT, deterministic=not module.has_rng('dropout'))(x)


def _rotate_ranks(x: jax.Array, rank: int) -> jax.Array:
    """`[..., 1, d]` -> `[..., r, d]`: x rotated by the index of each rank."""
    width = x.shape[-1]
    angles = jnp.arange(rank)[:, None] / _ROPE_BASE ** (jnp.arange(0, width, 2) / width)
    return rotate(x, (jnp.sin(angles), jnp.cos(angles)))
