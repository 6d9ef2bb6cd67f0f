"""A hypernetwork that writes a document into a linear associative memory: activations -> a `Lora`.

Each token of a document is one rank of the LoRA of `down_proj`. Its A is a key: where the adapted
model computes something alike, B, the value, reminds it of the token. Keys are made of what the
model computed before the token and, by attention, around it: who bought a thing may be told before
the thing is. Keys and values are learned maps of activations (compare MEND, arXiv 2110.11309), and
the memory is what some steps of gradient descent from keys to values find (the delta rule of fast
weight programmers, arXiv 2102.11174, on all tokens at once), in closed form. Values start as the
base model's own unembeddings of the tokens, whitened, so that each says its token rather than those
that are like it or frequent: no word need be learned. Several chunks or documents in one model are
reconciled (`lora.reconcile`) when they are asked about; in training they are summed.

Axes: n chunks, l layers, w layers that are written, s tokens, f feature width, z latent width, i
width of the MLP, h heads.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from d2l.hypernetwork import shared_pair
from hyperlora import lora
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.layers import PerLayerDense, dense
from hyperlora.lora import Lora, LoraPair
from hyperlora.models import decoder, quantization
from hyperlora.models.base import BaseModel
from hyperlora.models.families import DecoderConfig

# A document is written by 2^8 steps of gradient descent, whose length each layer learns.
_DOUBLINGS = 8
_LENGTH = 1 / 16  # at the start of training; at 1 steps are as long as is safe
_RIDGE = 0.3  # chosen on training articles, with 4 and 16 of them in the model
_FARTHEST = 8  # distances of 2^7 tokens and more are one


@dataclasses.dataclass(frozen=True)
class AssociativeConfig:
    """Shape of the hypernetwork.

    Attributes:
      num_layers: l, layers of the base model.
      inner: i.
      width: f, of the base model, which is the context encoder.
      written: w, the last layers, whose residual stream the model unembeds; the LoRA of the others
        is zero.
      scaling: multiplies every delta.
      latent_size: z.
      num_blocks: Transformer blocks in which all tokens of a chunk see each other.
      num_heads: of their attention, and of that which gathers keys; even.
      bottleneck: of the maps that make keys and values.
      shared_rank: of the LoRA that all documents share, in all layers: how to answer.
    """

    num_layers: int
    inner: int
    width: int
    written: int
    scaling: float
    latent_size: int
    num_blocks: int
    num_heads: int
    bottleneck: int
    shared_rank: int


class AssociativeMemory(nn.Module):
    """Activations of chunks -> a LoRA of a rank per token."""

    config: AssociativeConfig

    @nn.compact
    def __call__(
        self,
        features: dict[str, jax.Array],
        mask: jax.Array,
        iterative: bool = False,
        min_gate: float = 0.0,
    ) -> tuple[Lora, Lora]:
        """Generates LoRAs in one forward pass.

        Args:
          features: `hidden [n, 1 + s, f]`, of a layer in the middle, before the first token and at
            each; `keys [n, w, 1 + s, i]`, what `down_proj` reads there in the layers that are
            written; `values [n, s, f]`, the tokens' unembeddings.
          mask: `[n, s]` bool, True for tokens.
          iterative, min_gate: as `DocToLora` takes them; here nothing is run in turn, and no chunk
            has a gate.

        Returns:
          A Lora of n rows and rank s, and a Lora of one row.
        """
        c = self.config
        whiten = dense(c.width, ('embed', 'latent'), 'whiten', use_bias=True)  # see `build`
        values = _rms(whiten(features['values']))
        hidden = _rms(features['hidden'])
        x = jnp.concatenate([hidden[:, :-1], hidden[:, 1:], values], -1)
        x = dense(c.latent_size, ('embed', 'latent'), 'embed', use_bias=True)(x)
        for i in range(c.num_blocks):
            x = _Block(c.num_heads, name=f'block_{i}')(x, mask)
        x = nn.LayerNorm(name='norm')(x)

        def every_layer(x):
            return jnp.broadcast_to(x, (c.written, *x.shape))

        def scale(name, width):
            """A learned factor, from 1; as a power, it moves far in few steps."""
            init = nn.with_logical_partitioning(nn.initializers.zeros, ('layers', None))
            power = self.param(f'{name}_scale', init, (c.written, width))
            return jnp.exp(10 * power)[:, None, None]

        def mapped(name, x, width):
            y = nn.silu(PerLayerDense(c.bottleneck, ('embed', 'mlp'), name=f'{name}_down')(x))
            up = PerLayerDense(
                width, ('latent', 'lora'), kernel_init=nn.initializers.zeros, name=f'{name}_up'
            )
            return up(y)

        here = mask[..., None]
        keys = _rms(features['keys']).swapaxes(0, 1)
        at = keys[:, :, 1:]
        mean = jnp.sum(at, 2, keepdims=True, where=here) / jnp.maximum(here.sum(1), 1)[:, None]
        # What is computed before the first token is the same for all documents.
        known = jnp.arange(mask.shape[1])[:, None] > 0
        before = jnp.where(known, keys[:, :, :-1] - mean, 0)
        shares = PerLayerDense(
            c.num_heads, ('latent', None), kernel_init=nn.initializers.zeros, name='shares'
        )(every_layer(x))
        around = jnp.einsum('wnsh,nhst->wnst', shares, self._nearby(x, mask)) @ (at - mean)
        keys = before * scale('key', c.inner) + around
        inputs = jnp.concatenate([keys, every_layer(x)], -1)
        a = keys + mapped('key', inputs, c.inner)
        values = every_layer(values)
        inputs = jnp.concatenate([values, inputs], -1)
        gate = nn.sigmoid(PerLayerDense(1, ('embed', None), name='gate')(inputs))
        b = values * scale('value', c.width) + mapped('value', inputs, c.width)

        a, b = (jnp.where(here, x, 0) for x in (a, b * gate * scale('gate', 1)))

        def layers(x):
            return jnp.pad(x, ((c.num_layers - c.written, 0), (0, 0), (0, 0), (0, 0)))

        pair = LoraPair(layers(a / c.inner), layers(_descended(a, b, scale('rate', 1))))
        shape = c.num_layers, c.shared_rank, c.inner, c.width
        shared = shared_pair(self, 'down_proj', *shape, c.inner**-0.5)
        scaling = jnp.float32(c.scaling)
        return Lora({'down_proj': pair}, scaling), Lora({'down_proj': shared}, scaling)

    def _nearby(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Attention of every token to those around it, by what they are and how far away: latents
        `[n, s, z]` -> `[n, h, s, s]`. Half of the heads start by looking ahead, half back, each
        farther than the one before it."""
        heads = self.config.num_heads
        queries, keys = (
            dense(x.shape[-1], ('latent', None), name)(x).reshape(*x.shape[:2], heads, -1)
            for name in ('nearby_query', 'nearby_key')
        )
        places = np.arange(x.shape[1])
        ahead = places - places[:, None]
        steps = np.minimum(np.ceil(np.log2(np.abs(ahead) + 1)), _FARTHEST)
        steps = (np.sign(ahead) * steps).astype(int) + _FARTHEST

        def start(*_):
            sides = np.arange(-_FARTHEST, _FARTHEST + 1) * np.repeat([[1], [-1]], heads // 2, 0)
            reach = np.tile(np.linspace(2, _FARTHEST, heads // 2), 2)[:, None]
            return jnp.where((sides >= 0) & (sides <= reach), 0, -0.3)

        init = nn.with_logical_partitioning(start, (None, None))
        distance = self.param('distance', init, (heads, 2 * _FARTHEST + 1))
        logits = jnp.einsum('nshd,nthd->nhst', queries, keys) / queries.shape[-1] ** 0.5
        logits += 10 * distance[:, steps]  # so that it moves far in few steps
        weights = nn.softmax(jnp.where(mask[:, None, None], logits.astype(jnp.float32), -1e9))
        return weights.astype(logits.dtype)


class _Block(nn.Module):
    """Self-attention without order (activations know theirs) and an MLP, both after a norm."""

    num_heads: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        width = x.shape[-1]
        y = nn.LayerNorm(name='attention_norm')(x)
        attention = nn.MultiHeadDotProductAttention(
            self.num_heads, force_fp32_for_softmax=True, name='attention'
        )
        x += attention(y, mask=mask[:, None, None]).astype(x.dtype)
        y = nn.LayerNorm(name='mlp_norm')(x)
        y = nn.silu(dense(4 * width, ('latent', 'mlp'), 'up', use_bias=True)(y))
        return x + dense(width, ('mlp', 'latent'), 'down', use_bias=True)(y)


def _descended(keys: jax.Array, values: jax.Array, rate: jax.Array) -> jax.Array:
    """What to store instead of the values, so that keys that are alike do not drown each other.

    The memory of stored values u, `x -> (x @ keys^T / i) @ u`, is then the one that 2^k steps of
    gradient descent from nothing find for `keys -> values`: with G the keys' inner products, and
    R = 1 - length G / |G|, u = (1 + R + R^2 + ...) values length / |G|, a product of k factors
    1 + R^(2^j). What many keys have in common is learned in few steps, what sets a key apart in
    many: the longer the steps, the sharper the memory, and the less it makes of what it knows but
    in part.

    Args:
      keys: `[..., s, i]`.
      values: `[..., s, f]`.
      rate: multiplies the length of the steps; broadcasts to `[..., 1, 1]`.
    """
    keys, stored = keys.astype(jnp.float32), values.astype(jnp.float32)
    alike = jnp.einsum('...si,...ti->...st', keys, keys) / keys.shape[-1]
    most = jnp.maximum(jnp.abs(alike).sum(-1, keepdims=True).max(-2, keepdims=True), 1e-6)
    step = jnp.minimum(_LENGTH * rate, 1) / most
    left = jnp.eye(alike.shape[-1]) - step * alike
    stored *= step
    for i in range(_DOUBLINGS):
        stored += left @ stored
        if i < _DOUBLINGS - 1:
            left = left @ left
    return stored.astype(values.dtype)


def _rms(x: jax.Array) -> jax.Array:
    whole = x.astype(jnp.float32)
    return (whole * jax.lax.rsqrt(jnp.square(whole).mean(-1, keepdims=True) + 1e-6)).astype(x.dtype)


def build(config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh | None) -> Hypernetwork:
    """Builds the hypernetwork; the base reads. Contexts are `tokens [n, s]` and `mask [n, s]`.

    Raises:
      UserError: heads that are odd in number, none or no divisor of `latent_size`; more written
        layers than there are, or none.
    """
    c, shape = base.config, config.shape
    if shape.num_heads < 1 or shape.num_heads % 2 or shape.latent_size % shape.num_heads:
        raise UserError(
            f'hypernetwork.shape.num_heads must be positive and even, not {shape.num_heads}, and '
            f'divide latent_size ({shape.latent_size}): half of the heads look ahead, half back'
        )
    if not 1 <= shape.written <= c.num_layers:
        raise UserError(
            f'hypernetwork.shape.written must be from 1 to {c.num_layers}, the layers of '
            f'{base.name}, not {shape.written}'
        )
    module = AssociativeMemory(AssociativeConfig(c.num_layers, c.mlp_width, c.width, **shape))
    first = c.num_layers - shape.written

    begin = base.tokenizer.prompt('?')[0]  # so that something stands before the first token

    def encode(params, context):
        tokens = context['tokens']
        begun = jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=begin)
        hidden, keys = decoder.inputs_of(c, params, begun, 'down_proj')
        features = {
            'hidden': hidden[first],
            'keys': keys[first:].swapaxes(0, 1),
            'values': quantization.rows(_unembedding(c, params), tokens),
        }
        return features, context['mask']

    def start(params):
        return {**params, 'whiten': _whitening(c, base.params)}

    example = {'tokens': np.zeros((1, 8), np.int32), 'mask': np.ones((1, 8), bool)}
    reconcile = functools.partial(lora.reconcile, ridge=_RIDGE)
    return Hypernetwork(module, base, encode, example, start, reconcile)


def _unembedding(config: DecoderConfig, params: Any) -> Any:
    """`[v, f]`, perhaps quantized."""
    return params['embedder' if config.tie_embeddings else 'unembedder']['embedding']


@functools.partial(jax.jit, static_argnums=0)
def _whitening(config: DecoderConfig, params: Any) -> dict[str, jax.Array]:
    """The affine map that takes what makes the logits of a model's tokens, unembeddings times the
    final norm's scale, to mean 0 and covariance 1, without turning it: kernel `[f, f]`, bias `[f]`,
    f32."""
    rows = quantization.rows(_unembedding(config, params), jnp.arange(config.vocab_size))
    norm = params['final_norm']['scale'].astype(jnp.float32) + config.norm_offset
    scaled = rows.astype(jnp.float32) * norm
    mean = scaled.mean(0)
    covariance = scaled.T @ scaled / len(scaled) - jnp.outer(mean, mean)
    variances, axes = jnp.linalg.eigh(covariance)
    least = 1e-3 * variances.mean()
    turned = (axes * jax.lax.rsqrt(jnp.maximum(variances, least))) @ axes.T
    return {'kernel': norm[:, None] * turned, 'bias': -mean @ turned}
