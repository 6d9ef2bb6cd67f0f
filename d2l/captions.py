"""Training data of the captioner: pictures and their names.

Axes: n pictures of a group, t tokens, k labels, h and w height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from d2l.captioner import PREFIX
from d2l.pictures import Picture, read
from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel
from hyperlora.models.tokenizers import Tokenizer

QUESTION = 'What is in this image?'
_MARGIN = 1 / 8  # of a picture's side, by which it is moved or scaled


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
            `answer_tokens`, room for the question with its soft tokens, and for the name: pictures
            of longer names are left out.

        Raises:
          UserError: no picture is left.
        """
        self.config, self.seed = config, seed
        self.length = config.steps * groups_per_step
        soft = len(tokenizer.encode(PREFIX)) + config.tokens_per_image
        self.prompt = [0] * soft + tokenizer.prompt(QUESTION)
        pairs = [(p, [*tokenizer.encode(p.name), tokenizer.eos_id]) for p in pictures]
        room = min(config.answer_tokens, config.query_tokens - len(self.prompt) + 1)
        self.pairs = [(picture, name) for picture, name in pairs if len(name) <= room]
        if not self.pairs:
            raise UserError(f'none of {len(pairs)} pictures has a name of fewer than {room} tokens')

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """One group: `context` {pixels `[n, h, w, 3]`}, `query` (see `Learner.loss`)."""
        c = self.config
        rng = np.random.default_rng((self.seed, index))
        chosen = [self.pairs[i] for i in rng.choice(len(self.pairs), c.pictures)]
        query = {
            'tokens': np.zeros((c.pictures, c.query_tokens), np.int32),
            **{
                key: np.zeros((c.pictures, c.answer_tokens), np.int32)
                for key in ('labels', 'label_positions')
            },
            'label_weights': np.zeros((c.pictures, c.answer_tokens), np.float32),
        }
        for row, (_, name) in enumerate(chosen):
            text = [*self.prompt, *name[:-1]]
            query['tokens'][row, : len(text)] = text
            query['labels'][row, : len(name)] = name
            query['label_positions'][row, : len(name)] = len(self.prompt) - 1 + np.arange(len(name))
            query['label_weights'][row, : len(name)] = 1 / len(name)
        pixels = np.stack([_moved(rng, picture.pixels, c.image_size) for picture, _ in chosen])
        return {'context': {'pixels': pixels}, 'query': query}


def pixels(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture `[h, w, 3]` uint8 as the captioner reads it, `[size, size, 3]` f32 in -1..1."""
    image = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32) / 127.5 - 1


def _moved(rng: np.random.Generator, picture: np.ndarray, size: int) -> np.ndarray:
    """As `pixels`, of a random part: of nearly all of the picture, or more than it, on white."""
    height, width, _ = picture.shape
    left, top, right, bottom = rng.uniform(-_MARGIN, _MARGIN, 4) * (width, height, width, height)
    image = Image.fromarray(picture)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    box = left, top, width + right, height + bottom
    image = image.transform(
        (size, size), Image.Transform.EXTENT, box, Image.Resampling.BICUBIC, fillcolor='white'
    )
    return np.asarray(image, np.float32) / 127.5 - 1


def example(config: ConfigDict, base: BaseModel, encoder: BaseModel):
    """A group; see `data.abstract`."""
    white = Picture('a', '', '', np.full((8, 8, 3), 255, np.uint8))
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
