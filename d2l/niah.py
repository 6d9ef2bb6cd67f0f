"""Needle in a haystack: examples made on the fly from (seed, index).

Axes: c contexts, n chunks, s chunk tokens, b queries (one per context here), t query tokens,
k labels.

Source: Doc-to-LoRA (arXiv 2602.15902), section 4 and appendix A.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from d2l import chunking, haystacks
from hyperlora.models.base import BaseModel
from hyperlora.models.tokenizers import Tokenizer

NEEDLE = 'The special magic number is {}.'
QUESTION = 'What is the special magic number? Reply with only the number.'


def random_numbers(rng: np.random.Generator, count: int) -> list[str]:
    """Numbers of four random digits, in which each digit is equally frequent at each place.

    Each number is uniform; balancing them takes out of a batch's gradient the noise that only
    says which digits happened to come often, and which swamps the signal early in training.
    """
    places = [rng.permutation(count) % 10 + rng.integers(10) for _ in range(4)]
    return [''.join(str(digit % 10) for digit in number) for number in zip(*places, strict=True)]


@dataclasses.dataclass(frozen=True)
class Document:
    """A haystack with or without a needle, as tokens of whole sentences."""

    sentences: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        return [token for sentence in self.sentences for token in sentence]

    def split(self, rng: np.random.Generator, parts: int) -> list[list[int]]:
        """Random split at sentence boundaries into exactly `parts` chunks (some may be empty)."""
        cuts = np.sort(rng.integers(len(self.sentences) + 1, size=parts - 1))
        bounds = [0, *cuts.tolist(), len(self.sentences)]
        return [
            [t for s in self.sentences[a:b] for t in s]
            for a, b in zip(bounds[:-1], bounds[1:], strict=True)
        ]


class Writer:
    """Writes documents of sentences, with the encoded sentences kept."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._encode = functools.lru_cache(maxsize=50_000)(tokenizer.encode)

    def write(
        self,
        rng: np.random.Generator,
        haystack: haystacks.Haystack,
        tokens: int,
        needle: str | None,
        depth: float | None = None,
        line_breaks: float = 0.0,
    ) -> Document:
        """A document of at most `tokens` tokens (more only if the needle alone is longer).

        Args:
          haystack: source of the sentences.
          needle: the sentence to hide, or None.
          depth: 0 puts it first, 1 last; None at random.
          line_breaks: how many of the sentences begin a new line, as a fraction.
        """
        # What stands before a sentence is drawn when they are known: room for any of these.
        before = ('', ' ', '\n') if line_breaks else (' ',)

        def room(text: str) -> int:
            return max(len(self._encode(mark + text)) for mark in before)

        left = tokens - (room(needle) if needle else 0)
        texts: list[str] = []
        for text in haystack(rng, max(left // 4, 0)):
            left -= room(text)
            if left < 0:
                break
            texts.append(text)
        if needle:
            depth = rng.random() if depth is None else depth
            texts.insert(round(depth * len(texts)), needle)
        breaks = rng.random(len(texts)) < line_breaks
        marks = ['\n' if broken else ' ' for broken in breaks]
        marks[:1] = [''] if texts else []
        return Document(
            [list(self._encode(mark + text)) for mark, text in zip(marks, texts, strict=True)]
        )


def hide(tokenizer: Tokenizer, tokens: int, seed: int) -> tuple[str, list[int]]:
    """(number, tokens of generated sentences that tell it), for `QUESTION`."""
    rng = np.random.default_rng(seed)
    (number,) = random_numbers(rng, 1)
    written = Writer(tokenizer).write(rng, haystacks.varied, tokens, NEEDLE.format(number))
    return number, written.tokens


class NeedleGroups:
    """Random access to groups of contexts: item i depends on (seed, i) alone.

    A group is a packed row: `contexts` documents with a needle each, of k chunks, and a pool of
    needle-free chunks that all of them share. Each document counts a random part of the pool, each
    chunk of it up to `max_repeats` times: so a batch teaches, at the cost of a few chunks, what
    happens in documents of thousands.

    The curriculum is a list of stages {steps, contexts, tokens, chunk_length, chunks, pool,
    max_repeats, own_weight, question, haystacks}; the stage of an item follows from its index.
    `tokens` is the range of document lengths, `chunks` the odds of splitting a document into 1, 2,
    ... chunks (the same number for all groups of a step, so that shapes are few), `haystacks` a
    dict name -> odds.
    `own_weight` 0 leaves the documents out, so that the shared LoRA alone learns what all answers
    have in common before the generated ones join in.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        context_tokenizer: Tokenizer,
        stages: list[dict[str, Any]],
        seed: int,
        groups_per_step: int,
    ):
        self.seed, self.groups_per_step = seed, groups_per_step
        self.stages = [dict(stage) for stage in stages]
        self.tokenizer = tokenizer
        self.writer = Writer(context_tokenizer)
        self.haystacks = {
            name: haystacks.get(name) for stage in self.stages for name in stage['haystacks']
        }

    def __len__(self) -> int:
        return self.groups_per_step * sum(stage['steps'] for stage in self.stages)

    def _stage(self, step: int) -> dict[str, Any]:
        for stage in self.stages:
            step -= stage['steps']
            if step < 0:
                return stage
        raise IndexError('past the last stage')

    def __getitem__(self, index: int) -> dict[str, dict[str, np.ndarray]]:
        """One group: `context` {tokens, mask} of `[n, s]`; `query` {tokens [b, t], labels,
        label_positions, label_weights [b, k], chunk_weights [b, n]}."""
        step = index // self.groups_per_step
        stage = self._stage(step)
        shape_rng = np.random.default_rng((self.seed, 0, step))  # the same for all groups of a step
        rng = np.random.default_rng((self.seed, 1, index))
        odds = np.asarray(stage['chunks'])
        parts = 1 + int(shape_rng.choice(len(odds), p=odds / odds.sum()))
        return self.group(stage, parts, rng)

    def group(
        self, stage: dict[str, Any], parts: int, rng: np.random.Generator
    ) -> dict[str, dict[str, np.ndarray]]:
        """A group of a stage, each document in so many parts."""
        contexts, pool = stage['contexts'], stage['pool']

        def write(needle):
            names, odds = zip(*sorted(stage['haystacks'].items()), strict=True)
            name = names[rng.choice(len(names), p=np.asarray(odds) / sum(odds))]
            length = int(rng.integers(stage['tokens'][0], stage['tokens'][1] + 1))
            return self.writer.write(rng, self.haystacks[name], length, needle, line_breaks=0.1)

        numbers = random_numbers(rng, contexts)
        chunks = [
            chunk for number in numbers for chunk in write(NEEDLE.format(number)).split(rng, parts)
        ]
        chunks += [write(None).tokens for _ in range(pool)]
        tokens, mask = chunking.pad(
            [c[: stage['chunk_length']] for c in chunks], stage['chunk_length']
        )
        own = stage['own_weight'] * np.repeat(np.eye(contexts), parts, axis=1)
        repeats = np.exp(rng.random((contexts, pool)) * np.log(stage['max_repeats'])).round()
        repeats *= rng.random((contexts, pool)) < rng.random((contexts, 1))
        weights = np.concatenate([own, repeats], 1) * mask.any(1)  # an empty chunk says nothing
        return {
            'context': {'tokens': tokens, 'mask': mask},
            'query': {
                **self.answers(stage['question'], numbers),
                'chunk_weights': weights.astype(np.float32),
            },
        }

    def answers(self, question: str, numbers: list[str]) -> dict[str, np.ndarray]:
        """Query tokens and labels: each query's answer, then the end of the turn."""
        tokenizer = self.tokenizer
        prompt = tokenizer.prompt(question)
        labels = np.asarray([[*tokenizer.encode(n), tokenizer.eos_id] for n in numbers], np.int32)
        prompts = np.tile(np.asarray(prompt, np.int32), (len(numbers), 1))
        positions = len(prompt) - 1 + np.arange(labels.shape[1], dtype=np.int32)
        return {
            'tokens': np.concatenate([prompts, labels[:, :-1]], 1),
            'labels': labels,
            'label_positions': np.tile(positions, (len(numbers), 1)),
            'label_weights': np.full(labels.shape, 1 / labels.shape[1], np.float32),
        }


def example(config: ConfigDict, base: BaseModel, encoder: BaseModel) -> dict[str, dict[str, Any]]:
    """A group of the largest shape; see `data.abstract`."""
    source = NeedleGroups(base.tokenizer, encoder.tokenizer, config.stages, 0, 1)
    rng = np.random.default_rng(0)
    groups = [source.group(stage, len(stage['chunks']), rng) for stage in source.stages]
    return max(
        groups, key=lambda group: group['context']['tokens'].size + group['query']['tokens'].size
    )


def build(
    config: ConfigDict, base: BaseModel, encoder: BaseModel, seed: int, groups_per_step: int
) -> NeedleGroups:
    """The groups of a training; see `hyperlora.data`."""
    return NeedleGroups(base.tokenizer, encoder.tokenizer, config.stages, seed, groups_per_step)
