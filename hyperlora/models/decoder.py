"""The frozen language model: one linen decoder for every family, driven by a `DecoderConfig`.

Axes: b rows, s query tokens, t key tokens, d width, f MLP width, k key/value heads, q query heads
per key/value head, h head width, l layers, v vocabulary.

The base is frozen: its parameters are an argument of every function, never part of a TrainState.
A `Lora` enters the scan over layers as one more scanned input.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from hyperlora import lora as lora_lib
from hyperlora.lora import Lora
from hyperlora.models import quantization
from hyperlora.models.attention import attention, causal_attention, sees
from hyperlora.models.families import DecoderConfig, Rope

REMAT_POLICIES = {
    'none': jax.checkpoint_policies.everything_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
ACTIVATIONS = {
    'silu': nn.silu,
    'gelu': functools.partial(nn.gelu, approximate=False),
    'gelu_tanh': functools.partial(nn.gelu, approximate=True),
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


@struct.dataclass
class SoftTokens:
    """Embeddings that stand in for tokens, such as those of images.

    Attributes:
      embeddings: `[b, s, d]`, read where the group is not 0.
      groups: `[b, s]` int32: which tokens are of one image and so see each other in both
        directions; 0 for those of text.
    """

    embeddings: jax.Array
    groups: jax.Array


def prefix(embeddings: jax.Array, length: int) -> SoftTokens:
    """Embeddings `[b, t, d]` that stand in for the first t tokens of rows of `length` tokens, and
    are read in their order, as tokens are."""
    rows, count, _ = embeddings.shape
    room = (0, length - count)
    groups = jnp.pad(jnp.arange(1, count + 1), room)
    return SoftTokens(
        jnp.pad(embeddings, ((0, 0), room, (0, 0))), jnp.broadcast_to(groups, (rows, length))
    )


Angles = tuple[jax.Array, jax.Array]  # sine and cosine, `[b, s, 1, h / 2]` f32 each


@struct.dataclass
class Places:
    """Where the tokens of a pass stand; the same for all layers.

    Attributes:
      positions: `[b, s]` int32.
      segments: `[b, s]` or None, see `Decoder`.
      groups: `[b, s]` or None, see `SoftTokens`.
      angles: of rope in global layers.
      local_angles: in local layers, None where they are the same.
    """

    positions: jax.Array
    segments: jax.Array | None
    groups: jax.Array | None
    angles: Angles
    local_angles: Angles | None


def places(
    config: DecoderConfig,
    positions: jax.Array,
    segments: jax.Array | None = None,
    soft: SoftTokens | None = None,
) -> Places:
    """Computes the angles of rope, once for all layers."""

    def angles(rope: Rope) -> Angles:
        frequencies = rope.frequencies(config.head_dim)
        turned = positions[..., None, None].astype(jnp.float32) * frequencies
        return jnp.sin(turned), jnp.cos(turned)

    local = None if config.local_rope is None else angles(config.local_rope)
    groups = None if soft is None else soft.groups
    return Places(positions, segments, groups, angles(config.rope), local)


def rotate(x: jax.Array, angles: Angles) -> jax.Array:
    """Rotary embedding of `[b, s, heads, h]`, halves against each other (as Hugging Face)."""
    sin, cos = angles
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1).astype(x.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in f32.

    Attributes:
      eps: added to the mean square.
      offset: added to the learned scale.
    """

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.constant(1 - self.offset)
        scale = self.param('scale', nn.with_logical_partitioning(init, ('norm',)), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32**2, -1, keepdims=True) + self.eps)
        return (normed * (scale.astype(jnp.float32) + self.offset)).astype(x.dtype)


class Projection(nn.Module):
    """A linear map that carries an optional LoRA; kernel `[i, o]`."""

    features: int
    axes: tuple[str, str]
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, adapt: Adaptation) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), self.axes)
        kernel = self.param('kernel', init, (x.shape[-1], self.features))
        pair = None if adapt.pairs is None else adapt.pairs.get(self.name)
        y = lora_lib.project(x, kernel, pair, adapt.scaling, adapt.rank_weights)
        if self.use_bias:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, self.axes[1:])
            y += self.param('bias', zeros, (self.features,)).astype(x.dtype)
        return y


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
    def __call__(self, x, places, local, cache, adapt):
        c = self.config
        batch, tokens, _ = x.shape

        def project(name, heads):
            features = heads * c.head_dim
            y = Projection(features, ('embed', 'heads'), c.qkv_bias, name=name)(x, adapt)
            return y.reshape(batch, tokens, heads, c.head_dim)

        angles = places.angles
        if places.local_angles is not None:
            angles = jax.tree.map(
                lambda own, other: jnp.where(local, own, other), places.local_angles, angles
            )

        def turn(y, norm):
            if c.qk_norm:
                y = RMSNorm(c.norm_eps, c.norm_offset, name=norm)(y)
            return rotate(y, angles)

        q = turn(project('q_proj', c.num_heads), 'q_norm')
        k = turn(project('k_proj', c.num_kv_heads), 'k_norm')
        v = project('v_proj', c.num_kv_heads)
        settings = {'scale': c.query_scale, 'softcap': c.attention_softcap}
        if cache is None:
            y = causal_attention(
                q, k, v, places.segments, places.groups, c.attention_window, local, **settings
            )
            if self.cache_length is not None:
                room = ((0, 0), (0, self.cache_length - tokens), (0, 0), (0, 0))
                cache = KVCache(jnp.pad(k, room), jnp.pad(v, room))
        else:
            # Slot = position, and a query sees slots 0..position: padding to the right of a
            # prompt is overwritten by the generated tokens before any query can see it.
            at = jnp.arange(batch)[:, None], places.positions
            cache = KVCache(cache.k.at[at].set(k), cache.v.at[at].set(v))
            slots = jnp.arange(cache.k.shape[1])
            visible = sees(places.positions, slots, c.attention_window, local)
            y = attention(q, cache.k, cache.v, visible, **settings)
        out = Projection(x.shape[-1], ('heads', 'embed'), c.output_bias, name='o_proj')
        return out(y, adapt), cache


class Mlp(nn.Module):
    """Gated MLP."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, adapt):
        c = self.config

        def project(name, features, axes, x):
            return Projection(features, axes, c.mlp_bias, name=name)(x, adapt)

        gate = project('gate_proj', c.mlp_width, ('embed', 'mlp'), x)
        up = project('up_proj', c.mlp_width, ('embed', 'mlp'), x)
        return project('down_proj', c.width, ('mlp', 'embed'), ACTIVATIONS[c.activation](gate) * up)


class Block(nn.Module):
    """One layer; the body of the scan."""

    config: DecoderConfig
    cache_length: int | None

    @nn.compact
    def __call__(self, x, pairs, cache, local, places, scaling, rank_weights):
        c = self.config
        adapt = Adaptation(pairs, scaling, rank_weights)
        if local is None:  # all layers are of one kind
            local = any(c.local_layers)

        def norm(name, x):
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(x)

        x = nn.with_logical_constraint(x, ('batch', 'length', 'embed_activation'))
        y, cache = Attention(c, self.cache_length, name='attention')(
            norm('attention_norm', x), places, local, cache, adapt
        )
        h = x + (norm('attention_post_norm', y) if c.post_norms else y)
        y = Mlp(c, name='mlp')(norm('mlp_norm', h), adapt)
        return h + (norm('mlp_post_norm', y) if c.post_norms else y), cache


def local_flags(config: DecoderConfig) -> jax.Array | None:
    """`[l]` bool: which layers are local; None if all are of one kind."""
    mixed = len(set(config.local_layers)) > 1
    return jnp.asarray(config.local_layers) if mixed else None


def embed(
    config: DecoderConfig, table: jax.Array, tokens: jax.Array, soft: SoftTokens | None = None
) -> jax.Array:
    """What the first layer reads: `[b, s]` tokens, `[v, d]` embeddings -> `[b, s, d]`."""
    x = quantization.rows(table, tokens) * jnp.asarray(config.embedding_scale, table.dtype)
    if soft is None:
        return x
    return jnp.where(soft.groups[..., None] == 0, x, soft.embeddings.astype(x.dtype))


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
        self.embedder = nn.Embed(c.vocab_size, c.width, embedding_init=init)
        if not c.tie_embeddings:
            self.unembedder = nn.Embed(c.vocab_size, c.width, embedding_init=init)
        self.final_norm = RMSNorm(c.norm_eps, c.norm_offset)

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
        soft: SoftTokens | None = None,
        noise: jax.Array | None = None,
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
          soft: stand in for some of the tokens. Not together with a cache.
          noise: `[b, s, d]`, added to the embeddings.
        """
        c = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        block = Block
        if self.remat != 'none':
            block = nn.remat(Block, prevent_cse=False, policy=REMAT_POLICIES[self.remat])
        layers = nn.scan(
            block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(c, cache_length, name='layers')
        pairs, scaling = (None, None) if lora is None else (lora.pairs, lora.scaling)
        if scaling is not None:
            scaling = jnp.asarray(scaling, jnp.float32)
        x = embed(c, self.embedder.embedding, tokens, soft)
        if noise is not None:
            x += noise.astype(x.dtype)
        x, cache = layers(
            x,
            pairs,
            cache,
            local_flags(c),
            places(c, positions, segments, soft),
            scaling,
            rank_weights,
        )
        return DecoderOutput(self.final_norm(x), cache)

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """Logits in f32, `[..., d]` -> `[..., v]`."""
        table = self.embedder if self.config.tie_embeddings else self.unembedder
        contract = functools.partial(
            jnp.einsum, '...d,vd->...v', preferred_element_type=jnp.float32
        )
        # Tokens stay divided; else the gradient of the logits is gathered to meet a divided width.
        embedding = nn.with_logical_constraint(table.embedding, ('vocab', None))
        logits = quantization.product(contract, hidden, embedding.astype(hidden.dtype))
        cap = self.config.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def init_all(self, tokens: jax.Array) -> jax.Array:
        """Touches every parameter; for `init` only."""
        return self.unembed(self(tokens).hidden)


def first_layers(
    config: DecoderConfig,
    params: Any,
    tokens: jax.Array,
    count: int,
    segments: jax.Array | None = None,
    soft: SoftTokens | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the first `count` layers of a decoder, without a gradient.

    The layers' weights are read where they lie: a decoder of fewer layers would copy its slice.

    Args:
      tokens: `[b, s]` int32.
      segments: `[b, s]` int32: tokens of other segments are not seen. Without them, padding goes
        to the right.
      soft: stand in for some of the tokens.

    Returns:
      The final norm of the last layer's output, `[b, s, d]`, and the input of every layer,
      `[count, b, s, d]` (not computed under jit if not used).
    """
    x, inputs = _run_layers(config, params, tokens, count, segments, soft)
    norm = RMSNorm(config.norm_eps, config.norm_offset)
    final = jax.lax.stop_gradient(params['final_norm'])
    return norm.apply({'params': final}, x), inputs


def inputs_of(
    config: DecoderConfig, params: Any, tokens: jax.Array, module: str
) -> tuple[jax.Array, jax.Array]:
    """What every layer and a projection in it read, without a gradient.

    Args:
      tokens: `[b, s]` int32, padded to the right.
      module: the projection's name, a key of `lora.MODULES`.

    Returns:
      `[l, b, s, d]` and `[l, b, s, i]`.
    """
    return _run_layers(config, params, tokens, config.num_layers, tapped=module)[1:]


def _run_layers(config, params, tokens, count, segments=None, soft=None, tapped=''):
    """The output of the last of `count` layers, the input of each, and, if a projection is
    `tapped`, what that reads in each; see `first_layers`."""
    params = jax.lax.stop_gradient(params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    where = places(config, positions, segments, soft)
    kinds = local_flags(config)

    def layer(x, index):
        own, local = jax.tree.map(
            lambda p: jax.lax.dynamic_index_in_dim(p, index, keepdims=False),
            (params['layers'], kinds),
        )
        read = []

        def tap(call, args, kwargs, context):
            if context.module.name == tapped:
                read.extend(args[:1])
            return call(*args, **kwargs)

        with nn.intercept_methods(tap):
            block = Block(config, None)
            out, _ = block.apply({'params': own}, x, None, None, local, where, None, None)
        return out, (x, *read)

    x = embed(config, params['embedder']['embedding'], tokens, soft)
    x, (inputs, *read) = jax.lax.scan(layer, x, jnp.arange(count))
    return x, inputs, *read
