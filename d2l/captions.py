"""Training data of the captioner: pictures and their names.

Axes: n pictures of a group, t tokens, k labels, h and w height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from d2l.captioner import SHOTS
from d2l.pictures import PREFIX, Picture, read
from hyperlora.data import packing
from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel
from hyperlora.models.images import ImageProcessor
from hyperlora.models.tokenizers import Tokenizer

_MARGIN = 1 / 8  # of a picture's side, by which it is moved or scaled


def prompt(tokenizer: Tokenizer, soft: int) -> list[int]:
    """Tokens of a row up to the name; the first ones stand for so many soft tokens."""
    return [0] * soft + tokenizer.encode('\nCaption:')


def answer(tokenizer: Tokenizer, name: str) -> list[int]:
    """Tokens of a name, with the end of its line."""
    return tokenizer.encode(f' {name}\n')


class Captions:
    """Random-access source of groups of pictures; every array follows from (seed, index).

    Pictures are drawn anew for each group, moved, scaled and mirrored at random.
    """

    def __init__(
        self,
        pictures: Sequence[Picture],
        tokenizer: Tokenizer,
        config: ConfigDict,
        seed: int,
        groups_per_step: int,
    ):
        """
        Args:
          config: `image_size`; `tokens_per_image`; `pictures`, of a group; `query_tokens` and
            `answer_tokens`, room for the soft tokens with the name, and for the name: pictures of
            longer names are left out.

        Raises:
          UserError: no picture is left.
        """
        self.config, self.seed = config, seed
        self.length = config.steps * groups_per_step
        before = len(tokenizer.encode(SHOTS)) + len(tokenizer.encode(PREFIX))
        self.prompt = prompt(tokenizer, before + config.tokens_per_image)
        pairs = [(picture, answer(tokenizer, picture.name)) for picture in pictures]
        room = min(config.answer_tokens, config.query_tokens - len(self.prompt) + 1)
        self.pairs = [(picture, name) for picture, name in pairs if len(name) <= room]
        if not self.pairs:
            raise UserError(f'none of {len(pairs)} pictures has a name of at most {room} tokens')

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """One group: `context` {pixels `[n, h, w, 3]`}, `query` (see `Learner.loss`)."""
        c = self.config
        rng = np.random.default_rng((self.seed, index))
        chosen = [self.pairs[i] for i in rng.choice(len(self.pairs), c.pictures)]
        rows = ((self.prompt, name) for _, name in chosen)
        query = packing.unpacked(rows, c.query_tokens, c.answer_tokens)
        process = ImageProcessor(c.image_size)
        pixels = np.stack([process(_moved(rng, picture)) for picture, _ in chosen])
        return {'context': {'pixels': pixels}, 'query': query}


def _moved(rng: np.random.Generator, picture: Picture) -> Image.Image:
    """A random part of a picture, of nearly all of it or more than it, on white; or its mirror."""
    image = picture.image
    width, height = image.size
    left, top, right, bottom = rng.uniform(-_MARGIN, _MARGIN, 4) * (width, height, width, height)
    if picture.mirrors and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = left, top, width + right, height + bottom
    return image.transform(
        image.size, Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor='white'
    )


def example(config: ConfigDict, base: BaseModel, encoder: BaseModel):
    """A group; see `data.abstract`."""
    white = Picture('a', '', '', Image.new('RGB', (8, 8), 'white'))
    return Captions([white], base.tokenizer, config, 0, 1)[0]


def build(
    config: ConfigDict, base: BaseModel, encoder: BaseModel, seed: int, groups_per_step: int
) -> Captions:
    """The groups of a training; see `hyperlora.data`. Pictures of the styles in `config.held_out`
    are left out.

    Raises:
      UserError: unreadable pictures, or none to train on.
    """
    pictures = [p for p in read(config.sources) if p.style not in config.held_out]
    return Captions(pictures, base.tokenizer, config, seed, groups_per_step)
