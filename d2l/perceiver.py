"""Perceiver resampler: learned latents that read a context by cross-attention.

Axes: n rows (chunks, or chunks x layers), s context tokens, z latents, f feature width, d latent
width, h heads, k key/value heads, w head width.

Source: Doc-to-LoRA (arXiv 2602.15902), section 3 and Listing 1. As in the published runs, keys and
values come from the context alone, norms stand before and after attention and MLP, and there are
no biases.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora.layers import dense
from hyperlora.models.attention import attention
from hyperlora.models.decoder import REMAT_POLICIES, RMSNorm

_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class PerceiverConfig:
    """Shape of a Perceiver.

    Attributes:
      latent_size: d.
      num_latents: z, latents of the encoder.
      num_outputs: learned queries of the decoder block.
      num_blocks: cross-attention blocks of the encoder.
      num_self_attention: self-attention layers after each cross-attention.
      shared_blocks: one set of weights for every cross-attention but the first, and one for all
        self-attention layers.
      num_heads, num_kv_heads, head_dim: of every attention.
      projection_width: inner width of the SwiGLU that maps features to d.
      remat: what the backward pass keeps of each part, a key of `decoder.REMAT_POLICIES`.
    """

    latent_size: int
    num_latents: int
    num_outputs: int
    num_blocks: int
    num_self_attention: int
    shared_blocks: bool
    num_heads: int
    num_kv_heads: int
    head_dim: int
    projection_width: int
    remat: str = 'none'


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`."""

    width: int
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = dense(self.width, ('latent', 'mlp'), 'gate_proj')(x)
        up = dense(self.width, ('latent', 'mlp'), 'up_proj')(x)
        return dense(self.features, ('mlp', 'latent'), 'down_proj')(nn.silu(gate) * up)


class AttentionLayer(nn.Module):
    """Attention of latents to a context (or to themselves) and an MLP, each between two norms."""

    config: PerceiverConfig

    @nn.compact
    def __call__(
        self, latents: jax.Array, context: jax.Array | None, mask: jax.Array | None
    ) -> jax.Array:
        """Updates latents.

        Args:
          latents: `[n or 1, z, d]`; one row is shared by all, and its queries computed once.
          context: `[n, s, d]`, or None for self-attention.
          mask: `[n, s]` bool, True for tokens, or None.

        Returns:
          `[n, z, d]`.
        """
        c = self.config
        x = RMSNorm(_EPS, name='input_latents_layernorm')(latents)
        source = x if context is None else RMSNorm(_EPS, name='input_context_layernorm')(context)
        q = dense(c.num_heads * c.head_dim, ('latent', 'heads'), 'q_proj')(x)
        k = dense(c.num_kv_heads * c.head_dim, ('latent', 'heads'), 'k_proj')(source)
        v = dense(c.num_kv_heads * c.head_dim, ('latent', 'heads'), 'v_proj')(source)
        q = jnp.broadcast_to(q, (len(k), *q.shape[1:]))
        q, k, v = (t.reshape(*t.shape[:2], -1, c.head_dim) for t in (q, k, v))
        y = attention(q, k, v, None if mask is None else mask[:, None])
        y = dense(c.latent_size, ('heads', 'latent'), 'o_proj')(y)
        latents = latents + RMSNorm(_EPS, name='post_attention_layernorm')(y)
        y = RMSNorm(_EPS, name='pre_ff_layernorm')(latents)
        y = SwiGLU(4 * c.latent_size, c.latent_size, name='mlp')(y)
        return latents + RMSNorm(_EPS, name='post_ff_layernorm')(y)


class Perceiver(nn.Module):
    """Features of a context -> a fixed number of output embeddings."""

    config: PerceiverConfig

    @nn.compact
    def __call__(self, features: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Reads a batch of contexts.

        Args:
          features: `[n, s, f]`.
          mask: `[n, s]` bool, True for tokens.

        Returns:
          The encoder's latents `[n, z, d]` and the decoder's outputs `[n, num_outputs, d]`.
        """
        c = self.config

        def part(module):
            return module if c.remat == 'none' else nn.remat(module, policy=REMAT_POLICIES[c.remat])

        project = part(SwiGLU)(c.projection_width, c.latent_size, name='modality_projection')
        context = project(features)

        def queries(name, count):
            init = nn.with_logical_partitioning(nn.initializers.normal(1.0), (None, 'latent'))
            return self.param(name, init, (count, c.latent_size))[None]

        def layer(name):
            return part(AttentionLayer)(c, name=name)

        cross = [layer('cross_0')]
        if c.shared_blocks:
            cross += [layer('cross_1')] * (c.num_blocks - 1) if c.num_blocks > 1 else []
        else:
            cross += [layer(f'cross_{i}') for i in range(1, c.num_blocks)]
        count = c.num_self_attention * (1 if c.shared_blocks else c.num_blocks)
        own = [layer(f'self_{i}') for i in range(count)] * (c.num_blocks if c.shared_blocks else 1)

        x = queries('latents', c.num_latents)
        for i in range(c.num_blocks):
            x = cross[i](x, context, mask)
            for attend in own[i * c.num_self_attention : (i + 1) * c.num_self_attention]:
                x = attend(x, None, None)
        x = RMSNorm(_EPS, name='encoder_norm')(x)
        y = layer('decoder')(queries('output_queries', c.num_outputs), x, None)
        return x, RMSNorm(_EPS, name='decoder_norm')(y)
