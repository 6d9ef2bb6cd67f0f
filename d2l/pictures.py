"""Named pictures: emoji as several vendors draw them, and handwritten digits."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from hyperlora.data import readers
from hyperlora.errors import UserError

_DIGITS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of something.

    Attributes:
      name: what it shows, in lower case, such as `red apple`.
      group: of things of a kind, such as `food-fruit`.
      style: who drew it.
      pixels: `[h, w, 3]` uint8, on white.
    """

    name: str
    group: str
    style: str
    pixels: np.ndarray


def on_white(image: Image.Image) -> np.ndarray:
    """Pixels `[h, w, 3]` uint8 of an image that may be transparent."""
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    return np.asarray(Image.alpha_composite(white, image).convert('RGB'))


def read_emoji(path: str) -> Iterator[Picture]:
    """A package emoji-datasource-VENDOR as `npm pack` gives it, unpacked: emoji.json and
    img/VENDOR/64/. Flags and variations of skin are left out.

    Raises:
      UserError: not such a folder, or a picture is damaged.
    """
    folder = pathlib.Path(path).expanduser()
    vendors = [p.name for p in (folder / 'img').glob('*') if (p / '64').is_dir()]
    try:
        entries = json.loads((folder / 'emoji.json').read_text(encoding='utf-8'))
        entries = sorted(entries, key=lambda entry: entry['sort_order'])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: no emoji.json of emoji-datasource there ({error!r})') from error
    if not vendors:
        raise UserError(f'{path}: no pictures under img/VENDOR/64')
    for vendor in vendors:
        for entry in entries:
            if not entry.get(f'has_img_{vendor}') or entry['category'] in ('Flags', 'Component'):
                continue
            file = folder / 'img' / vendor / '64' / entry['image']
            try:
                with Image.open(file) as image:
                    pixels = on_white(image)
            except (OSError, SyntaxError) as error:
                raise UserError(f'{file}: not a readable picture ({error})') from error
            yield Picture(_name(entry), entry['subcategory'], vendor, pixels)


def read_digits() -> Iterator[Picture]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, dark on white."""
    from sklearn import datasets  # of the extra `pictures`

    found = datasets.load_digits()
    for image, label in zip(found.images, found.target, strict=True):
        grey = np.round(255 * (1 - image / 16)).astype(np.uint8)
        pixels = np.repeat(grey[..., None], 3, axis=-1)
        yield Picture(f'digit {_DIGITS[label]}', 'digit', 'handwriting', pixels)


READERS: dict[str, Callable[..., Iterator[Picture]]] = {'emoji': read_emoji, 'digits': read_digits}


def read(sources: list[dict[str, Any]]) -> list[Picture]:
    """The pictures of sources {reader, and its arguments}, in order.

    Raises:
      UserError: unknown reader or argument, or what the reader finds wrong.
    """
    found: list[Picture] = []
    for source in sources:
        try:
            found += readers.bind(READERS, source, 'pictures')()
        except ImportError as error:
            raise UserError(f"needs {error.name}: pip install 'hyperlora[pictures]'") from error
    return found


def _name(entry: dict[str, Any]) -> str:
    return ' '.join(entry['name'].lower().replace('-', ' ').split())
