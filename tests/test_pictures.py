"""Readers of named pictures."""

import json

import numpy as np
import pytest
from PIL import Image

from d2l import pictures
from hyperlora.errors import UserError


@pytest.fixture
def package(tmp_path):
    """A small emoji-datasource-mine: a red dot on nothing, a flag, and one without a picture."""
    entries = [
        {'name': 'RED DOT', 'image': 'b.png', 'category': 'Symbols', 'subcategory': 'dots'},
        {'name': 'NO-PICTURE', 'image': 'c.png', 'category': 'Symbols', 'subcategory': 'dots'},
        {'name': 'A FLAG', 'image': 'b.png', 'category': 'Flags', 'subcategory': 'flags'},
        {'name': 'BLUE-GREEN DOT', 'image': 'a.png', 'category': 'Symbols', 'subcategory': 'dots'},
    ]
    for place, entry in enumerate(entries):
        entry |= {'sort_order': -place, 'has_img_mine': entry['name'] != 'NO-PICTURE'}
    root = tmp_path / 'mine'  # alone in its folder
    root.mkdir()
    (root / 'emoji.json').write_text(json.dumps(entries))
    folder = root / 'img/mine/64'
    folder.mkdir(parents=True)
    for name, colour in (('a.png', (0, 128, 128, 255)), ('b.png', (255, 0, 0, 255))):
        image = Image.new('RGBA', (4, 4), (0, 0, 0, 0))
        image.putpixel((1, 2), colour)
        image.save(folder / name)
    return root


def test_emoji(package):
    first, second = pictures.read([{'reader': 'emoji', 'path': str(package)}])
    assert [(p.name, p.group, p.style) for p in (first, second)] == [
        ('blue green dot', 'dots', 'mine'),
        ('red dot', 'dots', 'mine'),
    ]
    wanted = np.full((4, 4, 3), 255)
    wanted[2, 1] = 255, 0, 0
    np.testing.assert_array_equal(second.image, wanted)


def test_pictures_called_by_code_points(package, tmp_path):
    entries = json.loads((package / 'emoji.json').read_text())
    for entry, code in zip(entries, ('2764-FE0F', '1F468', '1F1E6', '1F435'), strict=True):
        entry['unified'] = code
    (package / 'emoji.json').write_text(json.dumps(entries))
    folder = tmp_path / 'pictures'
    folder.mkdir()
    for name in ('2764.png', '1f435.webp', '1f1e6.png', '1f999.png'):
        Image.new('RGBA', (6, 6), (0, 0, 255, 255)).save(folder / name, lossless=True)
    (folder / '1f468.txt').write_text('no picture')
    source = {'reader': 'code_points', 'path': str(folder), 'names': str(package), 'style': 'new'}
    found = pictures.read([source])
    assert [(p.name, p.group, p.style) for p in found] == [
        ('blue green dot', 'dots', 'new'),
        ('red dot', 'dots', 'new'),
    ]
    assert found[0].image.getpixel((3, 3)) == (0, 0, 255)
    with pytest.raises(UserError, match='cannot read .*none'):
        pictures.read([{**source, 'path': str(tmp_path / 'none')}])


def test_digits():
    pytest.importorskip('sklearn')
    found = pictures.read([{'reader': 'digits'}])
    held_out = pictures.read([{'reader': 'digits', 'held_out': True}])
    assert len(found) == 1198 and len(held_out) == 599
    assert len({picture.name for picture in found + held_out}) == 10
    assert found[0].name == 'digit zero' and found[0].image.size == (8, 8)
    assert not found[0].mirrors
    # Ink on white: a zero is white in its middle.
    zeros = np.mean([np.asarray(p.image) for p in found if p.name == 'digit zero'], 0)
    assert zeros[4, 4].mean() > 200 > 128 > zeros[4, 2].mean()


def test_what_is_refused(package, tmp_path):
    def read(**source):
        return pictures.read([source])

    with pytest.raises(
        UserError, match='unknown reader of pictures .films.; known: emoji, code_points'
    ):
        read(reader='films')
    with pytest.raises(UserError, match='arguments of the reader .digits.'):
        read(reader='digits', path='x')
    with pytest.raises(UserError, match='no emoji.json'):
        read(reader='emoji', path=str(tmp_path / 'none'))
    (package / 'img/mine/64/b.png').write_bytes(b'\x89PNG cut')
    with pytest.raises(UserError, match='b.png is not an image'):
        read(reader='emoji', path=str(package))


def test_imagenette(monkeypatch):
    import tensorflow_datasets as tfds

    records = [{'label': 9, 'image': np.full((4, 5, 3), 7, np.uint8)}]
    monkeypatch.setattr(tfds, 'data_source', lambda *_, **__: records)
    (found,) = pictures.read([{'reader': 'imagenette', 'split': 'validation'}])
    assert (found.name, found.group, found.image.size) == ('parachute', 'parachute', (5, 4))

    def missing(*_, **__):
        raise FileNotFoundError('not prepared')

    monkeypatch.setattr(tfds, 'data_source', missing)
    with pytest.raises(UserError, match='cannot read the TFDS data set .*not prepared'):
        pictures.read([{'reader': 'imagenette'}])
