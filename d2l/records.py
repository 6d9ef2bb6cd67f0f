"""Documents ready for distillation, as ArrayRecord files.

A record is one document: its tokens as a context, and questions with their answers, where wanted
with the teacher's most likely tokens at each place of the answer. Beside each file lies a JSON
index (lengths of the contexts), so that training can choose documents by length without reading
them; a file without its index is not finished.

Axes: s tokens of the context, q questions, p tokens of all prompts, y tokens of all answers,
e the teacher's top entries.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence

import grain
import numpy as np
from array_record.python import array_record_module

from hyperlora.errors import UserError
from hyperlora.models.base import BaseModel

MANY_MISSES = 1000  # draws without a question that fits, after which there is likely none


@dataclasses.dataclass(frozen=True)
class Query:
    """A question as tokens.

    Attributes:
      prompt: `[p]`, the question in the chat template, without the document.
      answer: `[y]`, with the end of the turn.
      teacher_ids, teacher_log_probs: `[y, e]`, or None.
    """

    prompt: np.ndarray
    answer: np.ndarray
    teacher_ids: np.ndarray | None = None
    teacher_log_probs: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Record:
    """A document as tokens, and its questions.

    Attributes:
      context: `[s]`, tokens of the context encoder.
      teacher_prompts: of each question, tokens of the prompt that holds the document as well.
    """

    name: str
    context: np.ndarray
    queries: tuple[Query, ...]
    teacher_prompts: tuple[np.ndarray, ...]

    def to_bytes(self) -> bytes:
        """An .npz of flat arrays: nothing that unpickles."""

        def flat(arrays: Sequence[np.ndarray], dtype=np.int32) -> np.ndarray:
            return np.concatenate(arrays).astype(dtype)

        arrays = {
            'name': np.frombuffer(self.name.encode(), np.uint8),
            'context': self.context.astype(np.int32),
            'prompts': flat([q.prompt for q in self.queries]),
            'answers': flat([q.answer for q in self.queries]),
            'teacher_prompts': flat(self.teacher_prompts),
            'lengths': np.asarray(
                [
                    [len(q.prompt), len(q.answer), len(p)]
                    for q, p in zip(self.queries, self.teacher_prompts, strict=True)
                ],
                np.int32,
            ),
        }
        if self.queries[0].teacher_ids is not None:
            arrays['teacher_ids'] = flat([q.teacher_ids for q in self.queries])
            arrays['teacher_log_probs'] = flat(
                [q.teacher_log_probs for q in self.queries], np.float32
            )
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record:
        """The inverse of `to_bytes`.

        Raises:
          UserError: not such a record.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as file:
                arrays = dict(file)
            cuts = np.cumsum(arrays['lengths'], 0)[:-1].T
            prompts = np.split(arrays['prompts'], cuts[0])
            answers = np.split(arrays['answers'], cuts[1])
            ids = log_probs = [None] * len(answers)
            if 'teacher_ids' in arrays:
                ids = np.split(arrays['teacher_ids'], cuts[1])
                log_probs = np.split(arrays['teacher_log_probs'], cuts[1])
            return cls(
                arrays['name'].tobytes().decode(),
                arrays['context'],
                tuple(map(Query, prompts, answers, ids, log_probs)),
                tuple(np.split(arrays['teacher_prompts'], cuts[2])),
            )
        except _DAMAGE as error:
            raise UserError(f'not a record of a document ({error})') from error


# What reading a damaged archive raises.
_DAMAGE = (
    *(EOFError, IndexError, KeyError, OSError, RuntimeError, ValueError),
    *(zipfile.BadZipFile, zlib.error),
)


def shard_path(folder: pathlib.Path, shard: int, shards: int) -> pathlib.Path:
    return folder / f'documents-{shard:05}-of-{shards:05}.array_record'


def write_shard(path: pathlib.Path, records: Iterable[Record], meta: dict) -> int:
    """Writes one file and, when it is complete, its index; returns the number of records.

    Args:
      meta: kept in the index: what the records were made with.

    Raises:
      UserError: the disk is full, or cannot be written to.
    """
    partial = path.with_suffix('.partial')
    with _writing(path):
        writer = array_record_module.ArrayRecordWriter(str(partial), 'group_size:1')
    lengths = []
    for record in records:
        with _writing(path):
            writer.write(record.to_bytes())
        lengths.append(len(record.context))
    with _writing(path):
        writer.close()
        os.replace(partial, path)
        partial.write_text(json.dumps({**meta, 'lengths': lengths}))
        os.replace(partial, path.with_suffix('.json'))
    return len(lengths)


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # the latter is ArrayRecord's
        raise UserError(f'cannot write {path} ({error}): make room, then run again') from error


def is_complete(path: pathlib.Path) -> bool:
    return path.exists() and path.with_suffix('.json').exists()


def check_meta(path: pathlib.Path, meta: dict) -> None:
    """Raises UserError unless a finished file was made with the same settings."""
    found = json.loads(path.with_suffix('.json').read_text())
    if any(found.get(key) != json.loads(json.dumps(value)) for key, value in meta.items()):
        raise UserError(f'{path}: made with other settings; use another folder')


class Records:
    """Random access to the records of a folder.

    Attributes:
      folder: where they are.
      lengths: `[n]`, tokens of each context.
      meta: what all records were made with.
    """

    def __init__(self, folder: str):
        """
        Raises:
          UserError: no records there, an unfinished file, or files of different makings.
        """
        self.folder = folder
        root = pathlib.Path(folder).expanduser()
        files = sorted(root.glob('documents-*.array_record'))
        if not files:
            raise UserError(f'{folder}: no records of documents there; see launch.generate_data')
        expected = int(files[0].stem.rsplit('-', 1)[1])
        missing = [
            path.name
            for path in (shard_path(root, shard, expected) for shard in range(expected))
            if not is_complete(path)
        ]
        if missing:
            raise UserError(
                f'{folder}: {len(missing)} of {expected} files are not finished, the first '
                f'{missing[0]}; run launch.generate_data again, it goes on where it stopped'
            )
        indices = [json.loads(path.with_suffix('.json').read_text()) for path in files]
        lengths = [index.pop('lengths') for index in indices]
        if any(index != indices[0] for index in indices):
            raise UserError(f'{folder}: the files were made with different settings')
        self.meta = indices[0]
        self.lengths = np.concatenate([np.asarray(part, np.int32) for part in lengths])
        full = [str(path) for path, part in zip(files, lengths, strict=True) if part]
        if not full:
            raise UserError(
                f'{folder}: no document had a question that could be used: answers must end within '
                'settings.max_answer_tokens, documents and questions fit into the window'
            )
        self._source = grain.sources.ArrayRecordDataSource(full)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Record:
        return Record.from_bytes(self._source[int(index)])


class Joined:
    """Records of several folders, one after the other.

    Attributes:
      lengths: `[n]`, tokens of each context.
    """

    def __init__(self, folders: Sequence[Records]):
        self.folders = folders
        self.lengths = np.concatenate([records.lengths for records in folders])
        self._ends = np.cumsum([len(records) for records in folders])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Record:
        folder = int(np.searchsorted(self._ends, index, side='right'))
        return self.folders[folder][index - int(self._ends[folder]) + len(self.folders[folder])]


def load(folders: str, base: BaseModel) -> Joined:
    """The records of a folder, or of several with `+` between, for a base model.

    Raises:
      UserError: records that are unfinished, or made for another base model.
    """
    found = [Records(folder) for folder in folders.split('+')]
    for records in found:
        made_by = records.meta['base_fingerprint']
        if made_by != base.fingerprint:
            raise UserError(
                f'{records.folder} holds answers of the model {made_by}, not of '
                f'{base.fingerprint} ({base.name}): make them with launch.generate_data'
            )
    return Joined(found)
