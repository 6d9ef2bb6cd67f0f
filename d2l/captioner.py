"""A small captioner: a vision tower whose soft tokens a frozen language model reads.

No small vision-language model is at hand, so this makes one: tower and projector are trained in the
meta-learning loop until the frozen model names what a picture shows. Model and tower together are a
vision-language model whose text side is the base model's.

Each soft token is a mixture of the frozen model's own word embeddings. So pictures lie where texts
do, and a hypernetwork that has only read texts can read them (tower and projector are as in
`hyperlora.models.vision`).

Axes: n pictures, p tokens before a picture, t soft tokens of a picture, d width of the decoder, v
vocabulary, h and w height and width in pixels.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from d2l.pictures import PREFIX
from hyperlora.errors import UserError
from hyperlora.hypernetwork import Hypernetwork
from hyperlora.models.base import BaseModel
from hyperlora.models.vision import CHANNELS, ImageEncoder, MultimodalConfig, VisionConfig

# Without them SmolLM2 does not repeat even a name that it reads as words.
SHOTS = 'Image: dog\nCaption: dog\nImage: red car\nCaption: red car\n'


class Captioner(nn.Module):
    """Pictures -> soft tokens.

    Attributes:
      prefix: p tokens that stand before those of the picture: `SHOTS` and `pictures.PREFIX`.
      mix: give mixtures; else what their weights follow from, by products with the words, for the
        objective `alignment`, whose gradient does not vanish where a weight is near 1.
    """

    config: MultimodalConfig
    prefix: tuple[int, ...]
    mix: bool

    @nn.compact
    def __call__(
        self, features: tuple[jax.Array, jax.Array], mask: None = None
    ) -> tuple[jax.Array, None]:
        """Reads pictures.

        Args:
          features: pixels `[n, h, w, 3]` in -1..1, and the word embeddings `[v, d]` to mix.
          mask: not used; what other hypernetworks take.

        Returns:
          `[n, p + t, d]`, and None for the LoRA that all rows share.
        """
        pixels, words = features
        soft = ImageEncoder(self.config, name='encoder')(pixels)
        if self.mix:
            weights = nn.softmax(jnp.einsum('ntd,vd->ntv', soft, words).astype(jnp.float32))
            soft = jnp.einsum('ntv,vd->ntd', weights.astype(words.dtype), words)
        before = words[jnp.asarray(self.prefix, jnp.int32)]
        before = jnp.broadcast_to(before, (len(soft), *before.shape))
        return jnp.concatenate([before, soft], 1), None


def build(config: ConfigDict, base: BaseModel, mesh: jax.sharding.Mesh | None) -> Hypernetwork:
    """Builds the captioner. Its contexts are `pixels [n, h, w, 3]`.

    Raises:
      UserError: the patches cannot be pooled to so many soft tokens, or the words that the model
        reads are not those that it unembeds.
    """
    if not base.config.tie_embeddings:
        raise UserError(f'{base.name}: its embeddings are not tied; a captioner mixes them')
    vision = VisionConfig(norm_eps=1e-6, activation='gelu', **config.vision)
    side = round(config.tokens_per_image**0.5)
    if side**2 != config.tokens_per_image or not side or vision.side % side:
        raise UserError(
            f'{vision.side} x {vision.side} patches cannot be pooled to '
            f'tokens_per_image = {config.tokens_per_image}'
        )
    # Soft tokens stand first in a row; no token marks their places.
    whole = MultimodalConfig(base.config, vision, config.tokens_per_image, -1, -1, -1)

    def encode(params: Any, context: dict[str, jax.Array]):
        return (context['pixels'], params['embedder']['embedding']), None

    size = vision.image_size
    example = {'pixels': np.zeros((1, size, size, CHANNELS), np.float32)}
    encode_text = base.tokenizer.encode
    before = (*encode_text(SHOTS), *encode_text(PREFIX))
    module = Captioner(whole, before, config.mix)
    return Hypernetwork(module, base, encode, example)
