"""Text to hide a needle in: the standard block, generated sentences, real prose.

Every haystack is a source of sentences: a function (rng, count) -> consecutive sentences.
"""

from __future__ import annotations

import functools
import importlib.resources
import itertools
import json
import pathlib
import re
from collections.abc import Callable

import numpy as np

from hyperlora.errors import UserError

Haystack = Callable[[np.random.Generator, int], list[str]]

GRASS = (
    'The grass is green.',
    'The sky is blue.',
    'The sun is yellow.',
    'Here we go.',
    'There and back again.',
)

_NAMES = (
    'Anna, Boris, Carla, David, Elena, Farid, Grace, Hugo, Ines, Jonas, Kavya, Liam, Mei, '
    'Noah, Olga, Pedro, Rosa, Samir, Tessa, Yuki'
).split(', ')
_PLACES = (
    'Lisbon, Oslo, Nairobi, Kyoto, Lima, Toronto, Vienna, Mumbai, Quito, Dublin, the old '
    'harbour, the market square, the northern valley, a small village, the city library, the '
    'railway museum'
).split(', ')
_THINGS = (
    'bicycle, violin, lantern, telescope, ladder, teapot, map, notebook, radio, blanket, '
    'compass, painting, wooden chair, fishing boat, greenhouse'
).split(', ')
_QUALITIES = (
    'old, quiet, expensive, broken, famous, heavy, colourful, rare, surprisingly small, well '
    'known, carefully made, almost forgotten'
).split(', ')
_FIELDS = (
    'geology, medicine, music, astronomy, law, architecture, biology, chemistry, history, economics'
).split(', ')
_TEMPLATES = (
    'In {year}, {name} moved to {place} to study {field}.',
    'The {thing} in {place} is {quality}.',
    '{name} bought a {thing} for {number} dollars.',
    'There are {number} students of {field} in {place}.',
    '{name} and {name2} met in {place} in {year}.',
    'The train to {place} leaves at {hour}:{minute} from platform {small}.',
    'Nobody knows why the {thing} was left in {place}.',
    'According to {name}, {field} is harder than {field2}.',
    'The number of the house is {number}, and its door is {quality}.',
    'It took {small} days to carry the {thing} from {place} to {place2}.',
    'Why did {name} sell the {thing}?',
    '{name} wrote {small} books about {field} and one about a {thing}.',
    'The museum opened in {year} and now has {number} visitors a day.',
    'A {quality} {thing} was found near {place} last year.',
    'The code of the office in {place} was changed to {number} in {year}.',
    'Most people in {place} think that {field} is {quality}.',
    'Her favourite number is {small}, but his is {number}.',
    'The answer to the question about {field} is not known to {name}.',
)


def grass(rng: np.random.Generator, count: int) -> list[str]:
    """The standard block, over and over, from a random sentence on."""
    start = int(rng.integers(len(GRASS)))
    return list(itertools.islice(itertools.cycle(GRASS), start, start + count))


def varied(rng: np.random.Generator, count: int) -> list[str]:
    """Unrelated generated sentences with names, places and numbers."""

    def pick(options):
        return options[rng.integers(len(options))]

    def sentence():
        return pick(_TEMPLATES).format(
            name=pick(_NAMES),
            name2=pick(_NAMES),
            place=pick(_PLACES),
            place2=pick(_PLACES),
            thing=pick(_THINGS),
            quality=pick(_QUALITIES),
            field=pick(_FIELDS),
            field2=pick(_FIELDS),
            year=rng.integers(1700, 2025),
            number=rng.integers(10, 10000),
            small=rng.integers(2, 30),
            hour=rng.integers(0, 24),
            minute=f'{rng.integers(0, 60):02d}',
        )

    return [sentence() for _ in range(count)]


def consecutive(sentences: list[str]) -> Haystack:
    """Haystack of a text: its sentences from a random one on, wrapping round at the end."""

    def sample(rng: np.random.Generator, count: int) -> list[str]:
        start = int(rng.integers(len(sentences)))
        return [sentences[(start + i) % len(sentences)] for i in range(count)]

    return sample


def split_sentences(text: str) -> list[str]:
    """Sentences of 20 to 400 characters of running text; other material is dropped."""
    paragraphs = [' '.join(p.split()) for p in re.split(r'\n\s*\n', text)]
    pieces = [s for p in paragraphs for s in re.split(r'(?<=[.!?])\s+(?=[A-Z"])', p)]
    return [s for s in pieces if 20 <= len(s) <= 400 and s[-1] in '.!?']


@functools.cache
def python_manual() -> tuple[str, ...]:
    """Sentences of the language manual that every Python installation carries."""
    from pydoc_data.topics import topics

    running = [
        p
        for text in topics.values()
        for p in re.split(r'\n\s*\n', text)
        if not p.startswith((' ', '*', '+', '|', '-', '>'))
    ]
    return tuple(split_sentences(re.sub(r'[*`]', '', '\n\n'.join(running))))


@functools.cache
def data_set_descriptions() -> tuple[str, ...]:
    """Sentences of the descriptions of its data sets that TensorFlow Datasets carries."""
    files = importlib.resources.files('tensorflow_datasets').joinpath('datasets').iterdir()
    pages = sorted((file / 'README.md' for file in files), key=str)
    return tuple(
        split_sentences('\n\n'.join(p.read_text(encoding='utf-8') for p in pages if p.is_file()))
    )


@functools.cache
def words() -> tuple[str, ...]:
    """The words in small letters of `python_manual` and `data_set_descriptions`, of three letters
    at least."""
    text = ' '.join([*python_manual(), *data_set_descriptions()])
    return tuple(dict.fromkeys(re.findall(r"(?<![\w'])[a-z]{3,}(?![\w'])", text)))


def from_file(path: str) -> Haystack:
    """Haystack of a UTF-8 text file or of the paragraphs of a file in SQuAD format.

    Raises:
      UserError: unreadable file, not UTF-8, or too little prose in it.
    """
    try:
        text = pathlib.Path(path).read_text(encoding='utf-8-sig')
        if path.endswith('.json'):
            articles = json.loads(text)['data']
            text = '\n\n'.join(p['context'] for a in articles for p in a['paragraphs'])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as e:
        raise UserError(
            f'haystack {path!r} is neither {", ".join(HAYSTACKS)} nor a readable '
            f'UTF-8 text or SQuAD-format JSON file ({e})'
        ) from e
    sentences = split_sentences(text)
    if len(sentences) < 10:
        raise UserError(f'haystack {path!r} holds {len(sentences)} sentences; at least 10 needed')
    return consecutive(sentences)


HAYSTACKS = {
    'grass': lambda: grass,
    'varied': lambda: varied,
    'python_manual': lambda: consecutive(list(python_manual())),
    'data_set_descriptions': lambda: consecutive(list(data_set_descriptions())),
}


def get(name: str) -> Haystack:
    """A haystack by name, or of the text file of that path."""
    return HAYSTACKS[name]() if name in HAYSTACKS else from_file(name)
