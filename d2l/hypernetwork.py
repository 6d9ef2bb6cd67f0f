"""The Doc-to-LoRA hypernetwork: activations of a document -> a `Lora`.

Axes: n chunks, e entries of features (1 for `early_exit`, l for `per_layer_activations`), s
tokens, f feature width, l layers, m modules, r rank, d latent width, i and o a module's widths.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3 and Listings 1-2.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from d2l.perceiver import Perceiver, PerceiverConfig
from hyperlora.layers import PerLayerDense, dense
from hyperlora.lora import Lora, LoraPair
from hyperlora.models.decoder import REMAT_POLICIES


@dataclasses.dataclass(frozen=True)
class DocToLoraConfig:
    """Shape of the hypernetwork.

    Attributes:
      num_layers: l, layers of the base model.
      dims: (module, i, o) of every adapted module, sorted by name.
      rank: r, ranks per chunk.
      scaling: multiplies every delta; the paper uses 2 r^1.5.
      layer_to_layer: layer j of the LoRA is made from entry j of the features by one shared
        Perceiver (the main experiment); otherwise all layers are made from one entry.
      feature_width: f.
      latent_size, num_latents, num_blocks, num_self_attention, shared_blocks, num_heads,
        num_kv_heads, head_dim: of the Perceiver.
      num_pre_head_layers: residual MLPs before the heads.
      per_layer_processing: whether those have weights of their own for every layer.
      use_bias: whether a learned LoRA, shared by all contexts, is added.
      gate: whether each chunk's LoRA is multiplied by a learned gate in [0, 1]. Not in the paper:
        the LoRAs of thousands of chunks without content would add up; the gate shuts them off,
        exactly (the stretched sigmoid of Louizos et al., arXiv 1712.01312, without its noise).
      remat: what the backward pass keeps of each part of the Perceiver and of each residual MLP, a
        key of `decoder.REMAT_POLICIES`.
      scaler_b: initial value of the scalers of B. At the paper's 0 a small batch dithers around
        zero for hundreds of steps, because the heads learn in proportion to it.
    """

    num_layers: int
    dims: tuple[tuple[str, int, int], ...]
    rank: int
    scaling: float
    layer_to_layer: bool
    feature_width: int
    latent_size: int
    num_latents: int
    num_blocks: int
    num_self_attention: int = 0
    shared_blocks: bool = False
    num_heads: int = 16
    num_kv_heads: int = 4
    head_dim: int = 128
    num_pre_head_layers: int = 1
    per_layer_processing: bool = True
    use_bias: bool = True
    gate: bool = False
    scaler_b: float = 0.0
    remat: str = 'none'

    @property
    def perceiver(self) -> PerceiverConfig:
        """Shape of the Perceiver: one output per (layer, module, rank), or per (module, rank)."""
        outputs = len(self.dims) * self.rank * (1 if self.layer_to_layer else self.num_layers)
        return PerceiverConfig(
            self.latent_size,
            self.num_latents,
            outputs,
            self.num_blocks,
            self.num_self_attention,
            self.shared_blocks,
            self.num_heads,
            self.num_kv_heads,
            self.head_dim,
            projection_width=4 * self.feature_width,
            remat=self.remat,
        )


class ResidualMlp(nn.Module):
    """`x + LN(W2 silu(W1 LN(x)))`, inner width 4 d."""

    per_layer: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def linear(features, axes, name):
            if self.per_layer:
                return PerLayerDense(features, axes, name=name)
            return dense(features, axes, name, use_bias=True)

        width = x.shape[-1]
        y = nn.LayerNorm(epsilon=1e-5, name='norm_in')(x)
        y = nn.silu(linear(4 * width, ('latent', 'mlp'), 'up')(y))
        y = linear(width, ('mlp', 'latent'), 'down')(y)
        return x + nn.LayerNorm(epsilon=1e-5, name='norm_out')(y)


def shared_pair(
    hypernetwork: nn.Module, name: str, layers: int, rank: int, i: int, o: int, deviation: float
) -> LoraPair:
    """A learned LoRA of a module, one row, that all contexts share; A starts with a deviation, B at
    zero."""

    def factor(key, init, width):
        init = nn.with_logical_partitioning(init, ('layers', None, 'lora'))
        return hypernetwork.param(f'{key}_{name}', init, (layers, rank, width))[:, None]

    return LoraPair(
        factor('bias_a', nn.initializers.normal(deviation), i),
        factor('bias_b', nn.initializers.zeros, o),
    )


class DocToLora(nn.Module):
    """Features of chunks -> one LoRA per chunk, and the learned LoRA shared by all contexts."""

    config: DocToLoraConfig

    @nn.compact
    def __call__(
        self,
        features: jax.Array,
        mask: jax.Array,
        iterative: bool = False,
        min_gate: float = 0.0,
    ) -> tuple[Lora, Lora | None]:
        """Generates LoRAs in one forward pass.

        Args:
          features: `[n, e, s, f]`, from a context encoder.
          mask: `[n, s]` bool, True for tokens.
          iterative: run the Perceiver on one layer (`layer_to_layer`) or one chunk at a time:
            same result, less memory.
          min_gate: gates below it are shut. Training pushes the gate of an empty chunk only just to
            0, where its gradient ends; a threshold between there and the gates of chunks that
            speak keeps both at a distance. 0 in training.

        Returns:
          A Lora of n rows and rank r, and a Lora of one row (or None without `use_bias`).
        """
        c = self.config
        chunks, modules = features.shape[0], len(c.dims)
        latents, x = self._perceive(features, mask, iterative)
        x = x.reshape(chunks, c.num_layers, modules, c.rank, c.latent_size)
        # Layers and modules first, as in the weights: the products below are plain batched ones.
        x = x.transpose(1, 2, 0, 3, 4)
        mlp = ResidualMlp
        if c.remat != 'none':
            mlp = nn.remat(ResidualMlp, policy=REMAT_POLICIES[c.remat])
        for i in range(c.num_pre_head_layers):
            x = mlp(c.per_layer_processing, name=f'pre_head_{i}')(x)
        x = (x / jnp.linalg.norm(x.astype(jnp.float32), axis=-1, keepdims=True)).astype(x.dtype)

        widest = max(i + o for _, i, o in c.dims)
        head = self.param(
            'head',
            nn.with_logical_partitioning(
                nn.initializers.normal(0.5 / (c.latent_size + widest * c.rank) ** 0.5),
                ('layers', None, 'latent', 'lora'),
            ),
            (c.num_layers, modules, c.latent_size, widest),
        )
        flat = jnp.einsum('lmnrd,lmdo->lmnro', x, head)
        if c.gate:
            # Pooled over the latents: whether this chunk says anything at all. Starts open.
            gate = nn.Dense(
                1,
                kernel_init=nn.initializers.zeros,
                bias_init=nn.initializers.constant(2.0),
                name='gate',
            )(latents.mean(-2)).transpose(1, 0, 2)[..., None]  # [e, n, 1, 1]
            # Stretched beyond [0, 1] and cut off, so that a shut gate is exactly 0.
            gate = jnp.clip(1.2 * nn.sigmoid(gate) - 0.1, 0, 1)
            gate = jnp.where(gate < min_gate, 0, gate)

        chunk_pairs, shared_pairs = {}, {}
        for m, (name, i, o) in enumerate(c.dims):

            def per_rank(key, init, name=name):
                return self.param(
                    f'{key}_{name}',
                    nn.with_logical_partitioning(init, ('layers', None)),
                    (c.num_layers, c.rank),
                )[:, None, :, None]

            a = flat[:, m, ..., :i] * per_rank('scaler_a', nn.initializers.ones)
            start = nn.initializers.constant(c.scaler_b)
            b = flat[:, m, ..., i : i + o] * per_rank('scaler_b', start)
            chunk_pairs[name] = LoraPair(a, b * gate if c.gate else b)
            if c.use_bias:
                shared_pairs[name] = shared_pair(
                    self, name, c.num_layers, c.rank, i, o, 0.2 / (i * c.rank) ** 0.5
                )
        scaling = jnp.float32(c.scaling)
        return Lora(chunk_pairs, scaling), Lora(shared_pairs, scaling) if c.use_bias else None

    def _perceive(
        self, features: jax.Array, mask: jax.Array, iterative: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Latents `[n, e, z, d]` and outputs `[n, e, outputs, d]`."""
        perceiver = Perceiver(self.config.perceiver, name='perceiver')
        chunks, entries, tokens, width = features.shape
        if iterative and not self.is_initializing():
            over_layers = self.config.layer_to_layer
            if over_layers:
                xs = features.swapaxes(0, 1), jnp.broadcast_to(mask, (entries, *mask.shape))
            else:
                xs = features, mask[:, None]
            _, (latents, out) = nn.scan(
                lambda module, carry, xs: (carry, module(*xs)),
                variable_broadcast='params',
                split_rngs={'params': False},
            )(perceiver, (), xs)
            if over_layers:
                latents, out = latents.swapaxes(0, 1), out.swapaxes(0, 1)
            return latents, out
        latents, out = perceiver(
            features.reshape(chunks * entries, tokens, width), jnp.repeat(mask, entries, 0)
        )
        return (
            latents.reshape(chunks, entries, *latents.shape[1:]),
            out.reshape(chunks, entries, *out.shape[1:]),
        )
