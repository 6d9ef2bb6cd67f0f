"""A document of any length -> one LoRA.

Axes: n chunks, s tokens of a chunk, b queries, r rank, l layers, i and o widths.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from d2l import chunking
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.generation import answer, bucket
from hyperlora.lora import Lora
from hyperlora.trained import Trained

_TOKENS_PER_PASS = 4096  # bounds the memory of the context encoder
_MAX_RANK = 2048  # past this rank a growing LoRA is folded into its delta, which is smaller


class Internalizer:
    """Turns chunks into LoRAs, each distinct chunk once.

    Attributes:
      trained: the hypernetwork and its base model.
    """

    def __init__(self, trained: Trained, iterative: bool = False):
        """`iterative` runs the Perceiver layer by layer or chunk by chunk: less memory, slower.

        Raises:
          UserError: the checkpoint does not read documents, or its config does not say how they are
            cut.
        """
        trained.require_contexts('tokens', 'mask')
        length = trained.config.get('chunk_length')
        if not isinstance(length, int) or length < 1:
            raise UserError(f'chunk_length in the config of the checkpoint is {length!r}')
        self.trained = trained
        generate = functools.partial(
            trained.hypernetwork.generate, iterative=iterative, min_gate=trained.config.min_gate
        )
        self._run = functools.partial(
            jax.jit(generate), trained.params, trained.hypernetwork.encoder.params
        )
        self.shared: Lora | None = None

    def split(self, document: Sequence[int]) -> list[tuple[int, ...]]:
        """Chunks of a document's tokens, which are the context encoder's.

        Raises:
          UserError: the document is empty.
        """
        if not len(document):
            raise UserError('the document is empty; there is nothing to internalise')
        return [
            tuple(chunk)
            for chunk in chunking.split(
                document,
                self.trained.hypernetwork.encoder.tokenizer,
                self.trained.config.chunk_length,
            )
        ]

    def rank(self, chunks: Iterable[tuple[int, ...]]) -> int:
        """Of each of their LoRAs in `chunk_loras`: the shape's or, without it, one per token."""
        shape = self.trained.config.hypernetwork.shape
        return shape.get('rank') or max(map(self._padded, chunks))

    def _padded(self, chunk: tuple[int, ...]) -> int:
        """Its length when it is encoded: of a few sizes, or that of the longest chunk."""
        config = self.trained.config
        affixes = len(config.chunk_prefix) + len(config.chunk_suffix)
        return min(bucket(len(chunk) + affixes), max(config.chunk_length + affixes, 32))

    def chunk_loras(
        self,
        chunks: Iterable[tuple[int, ...]],
        report: Callable[[int], None] = lambda read: None,
    ) -> tuple[list[tuple[int, ...]], Lora]:
        """Distinct chunks -> those that say anything, and their LoRAs, one row each.

        A chunk whose gate is shut has a LoRA of zeros and is left out. Chunks are padded to a few
        lengths and run in batches of a few sizes; `report` hears of each how many it read.
        """
        config = self.trained.config
        prefix, suffix = tuple(config.chunk_prefix), tuple(config.chunk_suffix)
        by_length = collections.defaultdict(list)
        for chunk in chunks:
            by_length[self._padded(chunk)].append(chunk)
        kept, parts = [], []
        for length, waiting in sorted(by_length.items()):
            most = max(_TOKENS_PER_PASS // length, 1)
            while waiting:
                # The largest power of two that can be filled: no shape but powers of two.
                size = min(most, 1 << (len(waiting).bit_length() - 1))
                now, waiting = waiting[:size], waiting[size:]
                tokens, mask = chunking.pad([prefix + chunk + suffix for chunk in now], length)
                loras, self.shared = self._run({'tokens': tokens, 'mask': mask})
                speaks = np.flatnonzero(~lora_lib.silent_rows(loras))
                kept += [now[i] for i in speaks]
                parts.append(
                    loras.replace(pairs=jax.tree.map(lambda x, r=speaks: x[:, r], loras.pairs))
                )
                report(len(now))
        # A rank per token: longer chunks have more of them.
        parts = [lora_lib.pad_rank(part, max(p.rank for p in parts)) for part in parts]
        pairs = jax.tree.map(lambda *x: jnp.concatenate(x, 1), *(part.pairs for part in parts))
        return kept, Lora(pairs, loras.scaling)

    def __call__(
        self, document: Sequence[int], report: Callable[[float], None] = lambda done: None
    ) -> Lora:
        """The LoRA of a document, one row: all its chunks along the rank, and the shared LoRA.

        Args:
          report: see `chunks`.

        Raises:
          UserError: the document is empty.
        """
        return self.with_shared(self.chunks(document, report))

    def with_shared(self, *documents: Lora) -> Lora:
        """LoRAs of `chunks` in one, reconciled if the hypernetwork says how, with the LoRA that all
        documents share, which counts once."""
        shared = () if self.shared is None else (self.shared,)
        own = self._together(documents)
        whole = lora_lib.compact(lora_lib.concatenate(own, *shared))
        return lora_lib.pad_rank(whole, max(whole.rank, 1))  # of a document that says nothing

    def chunks(
        self, document: Sequence[int], report: Callable[[float], None] = lambda done: None
    ) -> Lora:
        """The LoRA of a document, one row: all its chunks along the rank, nothing else.

        A chunk that occurs k times is encoded once and counted k times. The memory of long
        documents is bounded, by folding a rank beyond what a delta can have, or as `lora.reconcile`
        does.

        Args:
          report: hears, as the document is read, which fraction of it is; what it raises ends that.

        Raises:
          UserError: the document is empty.
        """
        counts = collections.Counter(self.split(document))
        chunks = list(counts)
        read = 0

        def count(more):
            nonlocal read
            read += more
            report(read / len(chunks))

        def parts() -> Iterator[Lora]:
            step = max(_TOKENS_PER_PASS // max(map(self._padded, chunks)), 1)
            for start in range(0, len(chunks), step):
                kept, loras = self.chunk_loras(chunks[start : start + step], count)
                weights = jnp.asarray([counts[chunk] for chunk in kept], jnp.float32)
                yield lora_lib.fold(loras, weights[:, None])

        return self._together(parts())

    def _together(self, parts: Iterable[Lora]) -> Lora:
        """The LoRAs of chunks or documents, each a row, as one."""
        reconcile = self.trained.hypernetwork.reconcile
        return reconcile(parts) if reconcile else lora_lib.total(parts, _MAX_RANK)


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a document, both as tokens."""

    document: list[int]
    prompt: list[int]


class Answerer:
    """Answers many questions, each about a document of its own that is not in the prompt.

    Questions are answered in packed batches: the distinct chunks of a batch lie along one rank and
    each row weights its own by how often they occur. A batch has at most `max_rank` ranks, or one
    question; and one where chunks are reconciled, as that depends on which are together.
    """

    def __init__(self, internalizer: Internalizer, max_rows: int = 16, max_rank: int = _MAX_RANK):
        self.internalizer, self.max_rank = internalizer, max_rank
        self.max_rows = 1 if internalizer.trained.hypernetwork.reconcile else max_rows

    def __call__(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Answers in order."""
        answers: list[str] = []
        batch: list[tuple[Question, collections.Counter]] = []
        union: set[tuple[int, ...]] = set()
        for question in questions:
            counts = collections.Counter(self.internalizer.split(question.document))
            joint = union | counts.keys()
            rank = len(joint) * self.internalizer.rank(joint)
            if batch and (len(batch) == self.max_rows or rank > self.max_rank):
                answers += self._answer(batch, max_new_tokens)
                batch, joint = [], set(counts)
            batch.append((question, counts))
            union = joint
        return answers + (self._answer(batch, max_new_tokens) if batch else [])

    def _answer(self, batch, max_new_tokens: int) -> list[str]:
        base, prompts = self.internalizer.trained.base, [q.prompt for q, _ in batch]
        if len(batch) == 1:
            lora = lora_lib.round_rank(self.internalizer(batch[0][0].document))
            return answer(base, prompts, max_new_tokens, lora)
        distinct = dict.fromkeys(chunk for _, counts in batch for chunk in counts)
        kept, loras = self.internalizer.chunk_loras(distinct)
        weights = np.asarray([[counts[c] for c in kept] for _, counts in batch], np.float32)
        lora, rank_weights = lora_lib.compose(
            loras, self.internalizer.shared, 1, jnp.asarray(weights)
        )
        lora = lora_lib.round_rank(lora)
        rank_weights = jnp.pad(rank_weights, ((0, 0), (0, lora.rank - rank_weights.shape[1])))
        return answer(base, prompts, max_new_tokens, lora, rank_weights)
