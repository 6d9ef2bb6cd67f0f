"""What the page does, without the page: one model, the browsers that use it, and questions.

What computes holds one lock: a document until it is read, answers a piece at a time, so that
nothing is lost. Which browsers there are is behind a lock of its own: Stop reaches a reading.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from d2l import files, niah
from d2l.memory import Memory
from hyperlora import lora as lora_lib
from hyperlora import trained
from hyperlora.errors import UserError
from hyperlora.session import Adapter, Session

MAX_FILE = 20 * 2**20  # bytes of a document
MAX_ROWS = 2000  # of a CSV
_BROWSER_BYTES = 512 * 2**20  # of the LoRAs of one browser
_ALL_BYTES = 2 * 2**30  # of those of all; the browser that was away longest is forgotten
_MAX_BROWSERS = 1000
_EXAMPLE_TOKENS = 10_000  # past SmolLM2's window of 8192
_USUAL_TOKENS = 2000  # of a document
_ROWS_AT_ONCE = 32
_ANSWER_TOKENS = 32  # of a row
# Kind of checkpoint -> what of a session loads it.
_LOADED = {
    'documents': 'internalizer',
    'images': 'image_internalizer',
    'tasks': 'specializer',
}


@dataclasses.dataclass
class Browser:
    """What one browser has taught the model.

    Attributes:
      memories: checkpoint -> its documents.
      notes: (checkpoint, name of a document) -> its size, in words.
      texts: (checkpoint, name of a document) -> the hash of its text.
      tasks: (checkpoint, description) of the last task -> its LoRA.
      stops: how often reading was stopped: what was asked for before the last time ends.
    """

    memories: dict[str, Memory] = dataclasses.field(default_factory=dict)
    notes: dict[tuple[str, str], str] = dataclasses.field(default_factory=dict)
    texts: dict[tuple[str, str], int] = dataclasses.field(default_factory=dict)
    tasks: dict[tuple[str, str], Adapter] = dataclasses.field(default_factory=dict)
    stops: int = 0

    @property
    def nbytes(self) -> int:
        loras = [x for memory in self.memories.values() for x in memory.documents.values()]
        return sum(x.nbytes for x in loras + [task.lora for task in self.tasks.values()])


def shipped(kinds: Sequence[str], *more: str) -> list[str]:
    """Names of checkpoints that a browser may choose: those given, and the shipped ones that
    configs of these names made."""
    found = []
    for path in sorted(trained.PRETRAINED.glob('*/config.json')):
        if json.loads(path.read_text())['config']['name'] in kinds:
            found.append(path.parent.name)
    return list(dict.fromkeys([*more, *found]))


def read_document(text: str, path: str | None) -> tuple[str, str]:
    """(name, text) of what was pasted or, if there is one, of an uploaded file.

    Raises:
      UserError: it is empty, over `MAX_FILE`, or not a document.
    """
    name = Path(path).name if path else ' '.join(text.split())[:40]
    if path:
        text = files.text_of(_content(path), name)
    else:
        _check_size(name, len(text.encode()))
    if not text.strip():
        raise UserError('paste a document or choose a file first')
    return name, text


def _content(path: str) -> bytes:
    """Of an uploaded file. Raises UserError if it is over `MAX_FILE`."""
    _check_size(Path(path).name, Path(path).stat().st_size)
    return Path(path).read_bytes()


def _check_size(name: str, size: int) -> None:
    if size > MAX_FILE:
        raise UserError(f'{name}: {size / 2**20:.0f} MB are too much; at most 20 MB can be read')


def read_inputs(path: str) -> list[str]:
    """The column `input` of a CSV with a header, or else its first column.

    Raises:
      UserError: it is not such a file, or has more than `MAX_ROWS` rows.
    """
    name, text = read_document('', path)
    try:
        header, *rows = csv.reader(io.StringIO(text, newline=''))
    except (csv.Error, ValueError) as error:
        raise UserError(f'{name}: not a CSV file ({error})') from error
    column = header.index('input') if 'input' in header else 0
    inputs = [row[column] for row in rows if len(row) > column and row[column].strip()]
    if not inputs or len(inputs) > MAX_ROWS:
        raise UserError(f'{name}: {len(inputs)} inputs below the header; give 1 to {MAX_ROWS}')
    return inputs


class Engine:
    """A frozen model behind a lock, and what each browser has taught it."""

    def __init__(self, documents: str, tasks: str):
        """
        Args:
          documents, tasks: checkpoints that are offered first; see `trained.load`.

        Raises:
          UserError: one of them cannot be loaded.
        """
        self.documents = shipped(('d2l_niah', 'd2l_docs'), documents)
        self.tasks = shipped(('t2l',), tasks)
        self.images = shipped(('d2l_images',))
        self.needles = shipped(('d2l_niah',))
        self.lock = threading.RLock()
        self._registry = threading.Lock()  # taken last
        self._browsers: collections.OrderedDict[str, Browser] = collections.OrderedDict()
        self._sessions: dict[tuple[str, str], Session] = {}
        self.session = self.reader(documents)
        self._load('tasks', tasks)

    def reader(self, checkpoint: str) -> Session:
        """The session that internalises documents with a checkpoint of `documents`."""
        return self._load('documents', checkpoint)

    def _load(self, kind: str, checkpoint: str) -> Session:
        if checkpoint not in getattr(self, kind):
            raise UserError(f'{checkpoint!r} is not offered here')
        with self.lock:
            if (kind, checkpoint) not in self._sessions:
                first = next(iter(self._sessions.values()), None)
                # Of a quantized base, as some are trained with, nothing could be merged.
                session = Session(
                    **{kind: checkpoint}, base=first and first.base, quantization='none'
                )
                getattr(session, _LOADED[kind])
                self._sessions[kind, checkpoint] = session
            return self._sessions[kind, checkpoint]

    def browser(self, me: str) -> Browser:
        """The browser of an id, which only it knows.

        Raises:
          UserError: the page has no id yet.
        """
        with self.lock, self._registry:
            found = self._find(me)
            self._browsers.move_to_end(me)
            while len(self._browsers) > 1 and (
                len(self._browsers) > _MAX_BROWSERS
                or sum(x.nbytes for x in self._browsers.values()) > _ALL_BYTES
            ):
                self._browsers.popitem(last=False)
            return found

    def _find(self, me: str) -> Browser:
        if not me or not isinstance(me, str) or len(me) > 64:
            raise UserError('the page is still loading; try again')
        return self._browsers.setdefault(me, Browser())

    def stops(self, me: str) -> int:
        """How often a browser's reading was stopped, also while something is read."""
        with self._registry:
            return self._find(me).stops

    def stop(self, me: str) -> None:
        """Stops what a browser's document is read for, now or in its turn."""
        with self._registry:
            self._find(me).stops += 1

    # ---- documents

    def memory(self, me: str, checkpoint: str) -> Memory:
        """A browser's documents."""
        memories, session = self.browser(me).memories, self.reader(checkpoint)
        with self.lock:
            return memories.setdefault(checkpoint, session.memory())

    def free_name(self, me: str, checkpoint: str, name: str, text: str) -> str:
        """That of the document with this text; or else `name`, numbered if another has it."""
        texts = self.browser(me).texts
        with self.lock:
            kept = self.memory(me, checkpoint).documents
            same = [x for x in kept if texts.get((checkpoint, x)) == hash(text)]
            numbered = (f'{name} ({n})' for n in itertools.count(2))
            free = (x for x in itertools.chain([name], numbered) if x not in kept)
            return same[0] if same else next(free)

    def internalize(
        self,
        me: str,
        checkpoint: str,
        name: str,
        text: str,
        report: Callable[[float, str], None] = lambda done, about: None,
        stops: int | None = None,
    ) -> str:
        """Adds a document, in place of one of the same name.

        Args:
          stops: `self.stops(me)` when this was asked for; None for now.

        Returns:
          Its tokens, chunks and bytes, in words.

        Raises:
          UserError: the browser's share of the memory is full, or it was stopped; what was there
            is kept.
        """
        browser, memory = self.browser(me), self.memory(me, checkpoint)
        session = self.reader(checkpoint)
        tokens = session.tokens(text)
        about = f'{len(tokens):,} tokens in {len(session.internalizer.split(tokens)):,} chunks'
        stops = browser.stops if stops is None else stops

        def advance(done):
            report(done, about)
            if browser.stops > stops:
                raise UserError(f'stopped; {name} was not internalised')

        advance(0)
        with self.lock:
            before = dict(memory.documents), dict(memory.scales)
            memory.add(name, tokens, report=advance)
            if browser.nbytes > _BROWSER_BYTES:
                memory.documents, memory.scales = before
                raise UserError(f'there is no room for {name}; remove another document first')
            kept = memory.documents[name].nbytes
        cache = session.cache_nbytes(text)
        about += f'; LoRA {kept / 1e6:.1f} MB; in the prompt: {cache / 1e6:,.1f} MB of KV cache'
        browser.notes[checkpoint, name] = about
        browser.texts[checkpoint, name] = hash(text)
        return about

    def documents_adapter(self, me: str, checkpoint: str) -> Adapter | None:
        """The documents that are switched on, in one LoRA; None, the base model, if none is."""
        memory, session = self.memory(me, checkpoint), self.reader(checkpoint)
        with self.lock:
            lora = memory.lora()
        if lora is None:
            return None
        names = ', '.join(name for name, scale in memory.scales.items() if scale)
        fingerprint = session.base.fingerprint
        about = {'base_fingerprint': fingerprint, 'hypernetwork': checkpoint, 'documents': names}
        return Adapter(lora_lib.round_rank(lora), about)

    def warm_up(self) -> None:
        """Compiles what the first document and question would wait for."""
        checkpoint, me = self.documents[0], 'warm-up'
        document, question, _ = self.example(0, _USUAL_TOKENS)
        self.internalize(me, checkpoint, 'document', document)
        adapter = self.documents_adapter(me, checkpoint)
        for _ in self.ask((question, adapter), (question, None)):
            pass
        with self._registry:
            self._browsers.pop(me, None)

    def example(self, seed: int, tokens: int = _EXAMPLE_TOKENS) -> tuple[str, str, str]:
        """(document, question, answer): a number in, by default, more text than fits into the
        window."""
        tokenizer = self.session.internalizer.trained.hypernetwork.encoder.tokenizer
        number, tokens = niah.hide(tokenizer, tokens, seed)
        return tokenizer.decode(tokens), niah.QUESTION, number

    # ---- images

    def image(self, checkpoint: str, path: str | None) -> Adapter:
        """The LoRA of an uploaded image.

        Raises:
          UserError: there is none, or it is too large or not an image.
        """
        if not path:
            raise UserError('choose an image first')
        content = _content(path)
        session = self._load('images', checkpoint)
        with self.lock:
            return session.internalize_image(content)

    # ---- tasks

    def task(self, me: str, checkpoint: str, description: str) -> Adapter:
        """The LoRA of a description; a browser's last one is kept."""
        browser, session = self.browser(me), self._load('tasks', checkpoint)
        key = checkpoint, description.strip()
        with self.lock:
            if key not in browser.tasks:
                browser.tasks = {key: session.specialize(key[1])}
            return browser.tasks[key]

    def answer_all(
        self, adapter: Adapter, inputs: Sequence[str], report: Callable[[float], None]
    ) -> list[str]:
        """Answers to many inputs, other requests in between.

        Raises:
          UserError: an input does not fit into the window; its row is named.
        """
        window = self.session.base.config.max_length
        for row, text in enumerate(inputs, 1):
            tokens = len(self.session.prompt(text, _ANSWER_TOKENS)) + _ANSWER_TOKENS
            if tokens > window:
                raise UserError(
                    f'row {row} ({text[:20]}...): {tokens} tokens with the answer do not fit into '
                    f'the window of {window}; shorten it'
                )
        answers: list[str] = []
        while len(answers) < len(inputs):
            with self.lock:
                some = inputs[len(answers) : len(answers) + _ROWS_AT_ONCE]
                answers += self.session.ask_all(some, adapter, _ANSWER_TOKENS)
            report(len(answers) / len(inputs))
        return answers

    # ---- ask

    def ask(
        self, *asked: tuple[str, Adapter | None], max_new_tokens: int = 64
    ) -> Iterator[list[str]]:
        """Answers side by side: of each (question, adapter) as much as is there by now.

        Raises:
          UserError: a question is empty or does not fit into the window.
        """
        if not all(question.strip() for question, _ in asked):
            raise UserError('write a question or an input first')
        texts = [''] * len(asked)
        streams = dict(
            enumerate(self.session.stream(*pair, max_new_tokens=max_new_tokens) for pair in asked)
        )
        while streams:
            for i in list(streams):
                with self.lock:
                    piece = next(streams[i], None)
                if piece is None:
                    del streams[i]
                else:
                    texts[i] += piece
                    yield list(texts)
        yield list(texts)
