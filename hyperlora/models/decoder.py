"""The frozen language model: one linen decoder for every family, driven by a `DecoderConfig`.

Axes: b rows, s query tokens, t key tokens, d width, f MLP width, k key/value heads, q query heads
per key/value head, h head width, l layers, v vocabulary.

The base is frozen: its parameters are an argument of every function, never part of a TrainState.
A `Lora` enters the scan over layers as one more scanned input.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from hyperlora import lora as lora_lib
from hyperlora.lora import Lora
from hyperlora.models.attention import attention, causal_attention
from hyperlora.models.families import DecoderConfig

REMAT_POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far, `[l, b, t, k, h]` each; slot = position."""

    k: jax.Array
    v: jax.Array


@struct.dataclass
class DecoderOutput:
    """What one forward pass computes.

    Attributes:
      hidden: `[b, s, d]`, after the final norm.
      cache: the updated KVCache, or None.
    """

    hidden: jax.Array
    cache: KVCache | None


def rope(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding, halves rotated against each other (the Hugging Face layout).

    Args:
      x: `[b, s, heads, h]`.
      positions: `[b, s]` int32.
    """
    half = x.shape[-1] // 2
    inverse_frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * inverse_frequency
    sin, cos = jnp.sin(angles)[:, :, None], jnp.cos(angles)[:, :, None]
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in f32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param(
            'scale', nn.with_logical_partitioning(nn.initializers.ones, ('norm',)), (x.shape[-1],)
        )
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (normed * scale.astype(jnp.float32)).astype(x.dtype)


class Projection(nn.Module):
    """A linear map without bias that carries an optional LoRA; kernel `[i, o]`."""

    features: int
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, x: jax.Array, adapt: Adaptation) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
        kernel = self.param('kernel', init, (x.shape[-1], self.features)).astype(x.dtype)
        pair = None if adapt.pairs is None else adapt.pairs.get(self.name)
        return lora_lib.project(x, kernel, pair, adapt.scaling, adapt.rank_weights)


@struct.dataclass
class Adaptation:
    """One layer's share of a `Lora`: factors by module, scaling, rank weights per batch row."""

    pairs: dict[str, lora_lib.LoraPair] | None
    scaling: jax.Array | None
    rank_weights: jax.Array | None


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    config: DecoderConfig
    cache_length: int | None

    @nn.compact
    def __call__(self, x, positions, segments, cache, adapt):
        c = self.config
        batch, tokens, _ = x.shape

        def project(name, heads):
            y = Projection(heads * c.head_dim, ('embed', 'heads'), name=name)(x, adapt)
            return y.reshape(batch, tokens, heads, c.head_dim)

        q = rope(project('q_proj', c.num_heads), positions, c.rope_theta)
        k = rope(project('k_proj', c.num_kv_heads), positions, c.rope_theta)
        v = project('v_proj', c.num_kv_heads)
        if cache is None:
            y = causal_attention(q, k, v, segments)
            if self.cache_length is not None:
                room = ((0, 0), (0, self.cache_length - tokens), (0, 0), (0, 0))
                cache = KVCache(jnp.pad(k, room), jnp.pad(v, room))
        else:
            # Slot = position, and a query sees slots 0..position: padding to the right of a
            # prompt is overwritten by the generated tokens before any query can see it.
            rows = jnp.arange(batch)[:, None]
            cache = KVCache(cache.k.at[rows, positions].set(k), cache.v.at[rows, positions].set(v))
            y = attention(
                q, cache.k, cache.v, jnp.arange(cache.k.shape[1]) <= positions[:, :, None]
            )
        return Projection(x.shape[-1], ('heads', 'embed'), name='o_proj')(y, adapt), cache


class Mlp(nn.Module):
    """Gated MLP (SwiGLU)."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, adapt):
        c = self.config
        gate = Projection(c.mlp_width, ('embed', 'mlp'), name='gate_proj')(x, adapt)
        up = Projection(c.mlp_width, ('embed', 'mlp'), name='up_proj')(x, adapt)
        return Projection(c.width, ('mlp', 'embed'), name='down_proj')(nn.silu(gate) * up, adapt)


class Block(nn.Module):
    """One layer; the body of the scan."""

    config: DecoderConfig
    cache_length: int | None

    @nn.compact
    def __call__(self, x, pairs, cache, positions, segments, scaling, rank_weights):
        c = self.config
        adapt = Adaptation(pairs, scaling, rank_weights)
        x = nn.with_logical_constraint(x, ('batch', 'length', 'embed_activation'))
        y, cache = Attention(c, self.cache_length, name='attention')(
            RMSNorm(c.norm_eps, name='attention_norm')(x), positions, segments, cache, adapt
        )
        h = x + y
        out = h + Mlp(c, name='mlp')(RMSNorm(c.norm_eps, name='mlp_norm')(h), adapt)
        return out, cache


class Decoder(nn.Module):
    """A decoder-only language model.

    Attributes:
      config: its shape.
      remat: what the backward pass keeps of a layer, a key of `REMAT_POLICIES`.

    Computation runs in the dtype of the embedding; norms, softmax and logits in f32.
    """

    config: DecoderConfig
    remat: str = 'none'

    def setup(self):
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), ('vocab', 'embed'))
        self.embedder = _Embedder(c.vocab_size, c.width, init)
        if not c.tie_embeddings:
            self.unembedder = _Embedder(c.vocab_size, c.width, init)
        self.final_norm = RMSNorm(c.norm_eps)

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        lora: Lora | None = None,
        rank_weights: jax.Array | None = None,
        cache: KVCache | None = None,
        cache_length: int | None = None,
    ) -> DecoderOutput:
        """Runs all layers.

        Args:
          tokens: `[b, s]` int32. Padding goes to the right: causality hides it from the rest.
          positions: `[b, s]` int32, default 0..s-1.
          segments: `[b, s]` int32 of packed rows: tokens of other segments are not seen. Not
            together with a cache.
          lora: applied to its modules; its rows divide b.
          rank_weights: see `lora.project`.
          cache: of earlier tokens; keys and values are written at `positions` and attended to.
          cache_length: without a cache, make one with room for so many tokens, slot = index here.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        block = Block
        if self.remat != 'none':
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        layers = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast),
            length=self.config.num_layers,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(self.config, cache_length, name='layers')
        pairs, scaling = (None, None) if lora is None else (lora.pairs, lora.scaling)
        if scaling is not None:
            scaling = jnp.asarray(scaling, jnp.float32)
        x = self.embedder.embedding[tokens]
        x, cache = layers(x, pairs, cache, positions, segments, scaling, rank_weights)
        return DecoderOutput(self.final_norm(x), cache)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits in f32, `[..., d]` -> `[..., v]`."""
        table = self.embedder if self.config.tie_embeddings else self.unembedder
        return jnp.einsum(
            '...d,vd->...v',
            hidden,
            table.embedding.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter; for `init` only."""
        return self.unembed(self(tokens).hidden)


class _Embedder(nn.Module):
    vocab_size: int
    width: int
    init: Any

    def setup(self):
        self.embedding = self.param('embedding', self.init, (self.vocab_size, self.width))


def first_layers(
    config: DecoderConfig, params: Any, tokens: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
    """Runs the first `count` layers of a decoder, without a gradient.

    The layers' weights are read where they lie: a decoder of fewer layers would copy its slice.

    Args:
      tokens: `[b, s]` int32, padded to the right.

    Returns:
      The final norm of the last layer's output, `[b, s, d]`, and the input of every layer,
      `[count, b, s, d]` (not computed under jit if not used).
    """
    params = jax.lax.stop_gradient(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def layer(x, index):
        own = jax.tree.map(
            lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False), params['layers']
        )
        out, _ = Block(config, None).apply(
            {'params': own}, x, None, None, positions, None, None, None
        )
        return out, x

    x, inputs = jax.lax.scan(layer, params['embedder']['embedding'][tokens], jnp.arange(count))
    return RMSNorm(config.norm_eps).apply({'params': params['final_norm']}, x), inputs
