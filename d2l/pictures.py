"""Named pictures: emoji as several vendors draw them, handwritten digits, photographs."""

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
from hyperlora.models import images

# How a picture is asked about, and what stands before its tokens and before texts in their place.
QUESTION = 'What is in this image?'
PREFIX = 'Image:'

DIGITS = tuple(
    f'digit {word}' for word in 'zero one two three four five six seven eight nine'.split()
)

# In the order of their WordNet ids, as TFDS numbers them.
_IMAGENETTE = (
    'tench, English springer, cassette player, chain saw, church, French horn, garbage truck, '
    'gas pump, golf ball, parachute'
).split(', ')


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture of something.

    Attributes:
      name: what it shows, in lower case, such as `red apple`.
      group: of things of a kind, such as `food-fruit`.
      style: who drew it.
      image: in red, green and blue, on white.
      mirrors: whether its mirror image shows the same.
    """

    name: str
    group: str
    style: str
    image: Image.Image
    mirrors: bool = True


def entries(path: str) -> list[dict[str, Any]]:
    """What emoji.json of a package emoji-datasource-VENDOR lists, without flags, variations of skin
    and what older packages have no name for, in its order; `name` in lower case.

    Raises:
      UserError: not such a folder.
    """
    file = pathlib.Path(path).expanduser() / 'emoji.json'
    try:
        found = json.loads(file.read_text(encoding='utf-8'))
        found = sorted(found, key=lambda entry: entry['sort_order'])
        return [
            {**entry, 'name': ' '.join(entry['name'].lower().replace('-', ' ').split())}
            for entry in found
            if entry['name'] and entry['category'] not in ('Flags', 'Component')
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: no emoji.json of emoji-datasource there ({error!r})') from error


def read_emoji(path: str) -> Iterator[Picture]:
    """A package emoji-datasource-VENDOR as `npm pack` gives it, unpacked: emoji.json and
    img/VENDOR/64/. Flags and variations of skin are left out.

    Raises:
      UserError: not such a folder, or a picture is damaged.
    """
    listed, root = entries(path), pathlib.Path(path).expanduser() / 'img'
    vendors = [p.name for p in root.glob('*') if (p / '64').is_dir()]
    if not vendors:
        raise UserError(f'{path}: no pictures under img/VENDOR/64')
    for vendor in vendors:
        for entry in listed:
            if entry.get(f'has_img_{vendor}'):
                image = images.read(root / vendor / '64' / entry['image'], on_white=True)
                yield Picture(entry['name'], entry.get('subcategory', ''), vendor, image)


def read_code_points(path: str, names: str, style: str) -> Iterator[Picture]:
    """PNG and WebP files that are called by the code points of what they show, such as
    1f468-200d-1f33e.png; those that have no name are left out.

    Args:
      names: a package emoji-datasource-VENDOR, which names them.
      style: who drew them.

    Raises:
      UserError: no such folder or package, or a picture is damaged.
    """

    def key(code: str) -> str:
        return code.lower().replace('_', '-').replace('-fe0f', '')  # that picks a variant

    named = {key(entry['unified']): entry for entry in entries(names)}
    try:
        files = sorted(pathlib.Path(path).expanduser().iterdir())
    except OSError as error:
        raise UserError(f'cannot read {path} ({error.strerror})') from error
    for file in files:
        entry = named.get(key(file.stem))
        if entry and file.suffix.lower() in ('.png', '.webp'):
            image = images.read(file, on_white=True)
            yield Picture(entry['name'], entry.get('subcategory', ''), style, image)


def read_digits(held_out: bool = False) -> Iterator[Picture]:
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels, dark on white. Each digit is a
    group.

    Args:
      held_out: those to test on, the last third; otherwise those to train on.
    """
    from sklearn import datasets  # of the extra `pictures`

    found = datasets.load_digits()
    pairs = list(zip(found.images, found.target, strict=True))
    cut = len(pairs) * 2 // 3
    for image, label in pairs[cut:] if held_out else pairs[:cut]:
        grey = np.round(255 * (1 - image / 16)).astype(np.uint8)
        name = DIGITS[label]
        image = Image.fromarray(grey).convert('RGB')
        yield Picture(name, name, 'handwriting', image, mirrors=False)


def read_imagenette(
    split: str = 'validation', name: str = 'imagenette/320px-v2', data_dir: str | None = None
) -> Iterator[Picture]:
    """Photographs of ten things, by TFDS; each thing is a group.

    Raises:
      UserError: not prepared there.
    """
    for record in readers.tfds_source(name, split, data_dir):
        label = _IMAGENETTE[int(record['label'])]
        yield Picture(label, label, 'photograph', Image.fromarray(record['image']).convert('RGB'))


READERS: dict[str, Callable[..., Iterator[Picture]]] = {
    'emoji': read_emoji,
    'code_points': read_code_points,
    'digits': read_digits,
    'imagenette': read_imagenette,
}


def read(sources: list[dict[str, Any]]) -> list[Picture]:
    """The pictures of sources {reader, and its arguments}, in order.

    Raises:
      UserError: see `readers.read`.
    """
    return [picture for source in sources for picture in readers.read(READERS, source, 'pictures')]
