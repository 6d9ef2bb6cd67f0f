"""Gemma 3's eyes: the SigLIP vision tower, and the projector into the decoder's embeddings.

An image becomes a fixed number of soft tokens, which stand in for the image tokens of a sequence.

Axes: i images, p patches, e width of the tower, t soft tokens of an image, d width of the decoder,
b rows, s tokens, h and w height and width in pixels.

Source: SigLIP (arXiv 2303.15343) and Gemma 3 (arXiv 2503.19786, section 2.1), as transformers 5
computes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from hyperlora.errors import UserError
from hyperlora.models import families
from hyperlora.models.attention import full_attention
from hyperlora.models.decoder import ACTIVATIONS, RMSNorm, SoftTokens
from hyperlora.models.families import DecoderConfig

CHANNELS = 3  # red, green, blue


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a SigLIP vision tower.

    Attributes:
      image_size: height and width of an image in pixels; patch_size: those of a patch.
      activation: of the MLP, a key of `decoder.ACTIVATIONS`.
    """

    image_size: int
    patch_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    norm_eps: float
    activation: str

    @property
    def side(self) -> int:
        """Patches along a side of an image; pixels that fill no patch are not read."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class MultimodalConfig:
    """A decoder that reads images.

    Attributes:
      tokens_per_image: t, a square number.
      image_token: the token in whose places soft tokens stand, t of them for each image.
      image_start, image_end: the tokens before and after them.
    """

    text: DecoderConfig
    vision: VisionConfig
    tokens_per_image: int
    image_token: int
    image_start: int
    image_end: int


_DEFAULTS = {
    'hidden_act': 'gelu_pytorch_tanh',
    'hidden_size': 768,
    'image_size': 224,
    'intermediate_size': 3072,
    'layer_norm_eps': 1e-6,
    'num_attention_heads': 12,
    'num_channels': CHANNELS,
    'num_hidden_layers': 12,
    'patch_size': 16,
    'vision_use_head': True,
    # Of other models around a tower; not used.
    'projection_dim': None,
    'tie_word_embeddings': None,
}


def from_hf(config: Mapping[str, Any]) -> MultimodalConfig:
    """Reads the contents of a Hugging Face config.json of a Gemma 3 with a vision tower.

    Raises:
      UserError: not such a model, a key is missing or not known, or the model needs something
        that is not supported.
    """
    if config.get('model_type') != 'gemma3':
        raise UserError(f'model_type {config.get("model_type")!r} reads no images; gemma3 does')
    text = families.from_hf(config)
    whole = families.multimodal_settings(config)
    vision = _vision_config(whole['vision_config'])
    side = math.isqrt(whole['mm_tokens_per_image'])
    if side**2 != whole['mm_tokens_per_image'] or side == 0 or vision.side % side:
        raise UserError(
            f'gemma3: {vision.side} x {vision.side} patches cannot be pooled to '
            f'mm_tokens_per_image = {whole["mm_tokens_per_image"]}'
        )
    return MultimodalConfig(
        text=text,
        vision=vision,
        tokens_per_image=side**2,
        image_token=whole['image_token_index'],
        image_start=whole['boi_token_index'],
        image_end=whole['eoi_token_index'],
    )


def _vision_config(config: Mapping[str, Any]) -> VisionConfig:
    family = config.get('model_type')
    if family != 'siglip_vision_model':
        raise UserError(f'vision tower {family!r} is not supported (only siglip_vision_model)')
    c = families.complete(config, {family: _DEFAULTS}, required=())
    only = {'num_channels': CHANNELS, 'vision_use_head': False}
    for key, value in only.items():
        if c[key] != value:
            raise UserError(f'{family}: {key} = {c[key]!r} is not supported (only {value})')
    for key in ('image_size', 'patch_size'):
        if not isinstance(c[key], int):
            raise UserError(f'{family}: {key} = {c[key]!r} is not supported (only one number)')
    if c['hidden_size'] % c['num_attention_heads']:
        raise UserError(
            f'{family}: hidden_size {c["hidden_size"]} is not a multiple of '
            f'num_attention_heads {c["num_attention_heads"]}'
        )
    return VisionConfig(
        image_size=c['image_size'],
        patch_size=c['patch_size'],
        num_layers=c['num_hidden_layers'],
        width=c['hidden_size'],
        mlp_width=c['intermediate_size'],
        num_heads=c['num_attention_heads'],
        norm_eps=c['layer_norm_eps'],
        activation=families.activation(c, 'hidden_act'),
    )


def _dense(features: int, axes: tuple[str | None, str | None], name: str) -> nn.Dense:
    init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), axes)
    return nn.Dense(features, kernel_init=init, name=name)


def _norm(config: VisionConfig, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(config.norm_eps, use_fast_variance=False, name=name)


class _Attention(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        q, k, v = (
            _dense(c.width, ('embed', 'heads'), name)(x).reshape(*x.shape[:2], c.num_heads, -1)
            for name in ('q_proj', 'k_proj', 'v_proj')
        )
        return _dense(c.width, ('heads', 'embed'), 'out_proj')(full_attention(q, k, v))


class _Mlp(nn.Module):
    config: VisionConfig

    @nn.compact
    def __call__(self, x):
        c = self.config
        x = ACTIVATIONS[c.activation](_dense(c.mlp_width, ('embed', 'mlp'), 'fc1')(x))
        return _dense(c.width, ('mlp', 'embed'), 'fc2')(x)


class _Block(nn.Module):
    """One layer; the body of the scan."""

    config: VisionConfig

    @nn.compact
    def __call__(self, x, _):
        c = self.config
        x = x + _Attention(c, name='attention')(_norm(c, 'attention_norm')(x))
        return x + _Mlp(c, name='mlp')(_norm(c, 'mlp_norm')(x)), None


class _PatchEmbedding(nn.Module):
    """A convolution with the stride of its kernel `[x, y, c, e]`: x across, y down."""

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels):
        size, side, width = self.config.patch_size, self.config.side, self.config.width
        init = nn.with_logical_partitioning(
            nn.initializers.lecun_normal(in_axis=(0, 1, 2)), (None, None, None, 'embed')
        )
        kernel = self.param('kernel', init, (size, size, CHANNELS, width))
        bias = self.param('bias', nn.initializers.zeros, (width,))
        pixels = pixels[:, : side * size, : side * size].astype(kernel.dtype)
        patches = pixels.reshape(-1, side, size, side, size, CHANNELS)
        x = jnp.einsum('ihywxc,xyce->ihwe', patches, kernel)
        return x.reshape(-1, side**2, width) + bias


class VisionTower(nn.Module):
    """SigLIP's vision transformer: images `[i, h, w, 3]` -> states of patches `[i, p, e]`.

    Computation runs in the dtype of the parameters.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        c = self.config
        x = _PatchEmbedding(c, name='patch_embedding')(pixels)
        x += self.param(
            'position_embedding',
            nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, 'embed')),
            (c.side**2, c.width),
        )
        layers = nn.scan(
            _Block,
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: 'layers'},
        )(c, name='layers')
        return _norm(c, 'final_norm')(layers(x, None)[0])


class Projector(nn.Module):
    """Pools the patches of an image to soft tokens of the decoder, `[i, p, e]` -> `[i, t, d]`."""

    config: MultimodalConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        side = math.isqrt(c.tokens_per_image)
        pool = c.vision.side // side
        x = x.reshape(-1, side, pool, side, pool, c.vision.width).mean((2, 4))
        x = x.reshape(-1, c.tokens_per_image, c.vision.width)
        x = RMSNorm(c.vision.norm_eps, c.text.norm_offset, name='soft_emb_norm')(x)
        return x @ self.param(
            'projection',
            nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, 'embed')),
            (c.vision.width, c.text.width),
        )


class ImageEncoder(nn.Module):
    """Vision tower and projector: images `[i, h, w, 3]` -> soft tokens `[i, t, d]`."""

    config: MultimodalConfig

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        states = VisionTower(self.config.vision, name='vision_tower')(pixels)
        return Projector(self.config, name='projector')(states)


def soft_tokens(
    config: MultimodalConfig, params: Any, tokens: jax.Array, pixels: jax.Array
) -> SoftTokens:
    """The soft tokens of a batch's images in the places of its image tokens, without a gradient.

    Args:
      params: of the whole model, see `weights.table`.
      tokens: `[b, s]` int32. Each unbroken run of image tokens is a group.
      pixels: `[b, i, h, w, 3]`, the images of each row in order, i > 0. A row of fewer images is
        padded at the end by images of any content.

    Returns:
      SoftTokens; NaN in a row whose image tokens are not those of at most i whole images.
    """
    rows, images = pixels.shape[:2]
    encoder = ImageEncoder(config)
    values = encoder.apply(
        {'params': jax.lax.stop_gradient(params)}, pixels.reshape(-1, *pixels.shape[2:])
    )
    values = values.reshape(rows, images * config.tokens_per_image, -1)
    is_image = tokens == config.image_token
    rank = jnp.cumsum(is_image, 1)
    count = rank[:, -1:]
    whole = (count % config.tokens_per_image == 0) & (count <= values.shape[1])
    embeddings = jnp.take_along_axis(values, jnp.maximum(rank - 1, 0)[..., None], 1, mode='clip')
    starts = is_image & ~jnp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return SoftTokens(
        jnp.where(whole[..., None], embeddings, jnp.nan), jnp.cumsum(starts, 1) * is_image
    )


def tokens_with_images(
    config: MultimodalConfig, encode: Callable[[str], list[int]], texts: Sequence[str]
) -> list[int]:
    """The tokens `[s]` of texts with an image between each two, as in Gemma 3's template.

    Args:
      encode: text to tokens, as `Tokenizer.encode`.
      texts: one more than there are images; empty where an image is first or last or follows
        another.
    """
    image = [
        config.image_start,
        *[config.image_token] * config.tokens_per_image,
        config.image_end,
    ]
    tokens = []
    for i, text in enumerate(texts):
        # Encoded together with the newlines around an image, for BPE may merge them.
        if i > 0:
            tokens += image
            text = f'\n\n{text}'
        if i + 1 < len(texts):
            text = f'{text}\n\n'
        tokens += encode(text)
    return tokens
