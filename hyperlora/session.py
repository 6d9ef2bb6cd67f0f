"""The way in from Python: teach a frozen model a document or a task, and ask it.

    session = Session()
    adapter = session.internalize(text)
    print(session.ask('Who keeps the lighthouse?', adapter))

What is taught is an `Adapter`, a LoRA with a note of where it comes from; it can be composed with
others, saved and loaded. `hyperlora.lora` says what a `Lora` is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from d2l.image_internalizer import ImageInternalizer
from d2l.internalize import Internalizer
from d2l.memory import Memory
from d2l.prompts import in_context_prompt
from hyperlora import adapters, generation, trained
from hyperlora import lora as lora_lib
from hyperlora.errors import UserError
from hyperlora.lora import Lora
from hyperlora.models import images, weights
from hyperlora.models.base import BaseModel, hf_config, load_base
from t2l.specialize import Specializer


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA of one row, and where it comes from.

    Attributes:
      lora: what the base model answers with.
      metadata: of its file: `base_fingerprint`, `hypernetwork`, and `document_sha256`,
        `image_sha256` or `task`.
    """

    lora: Lora
    metadata: dict[str, str]


class Session:
    """A frozen base model with hypernetworks for documents, tasks and images, each loaded when it
    is first needed."""

    def __init__(
        self,
        documents: str = 'smollm2-docs',
        tasks: str = 'smollm2-t2l',
        images: str = 'smollm2-images',
        captioner: str = 'smollm2-captioner',
        base: str | BaseModel | None = None,
        quantization: str | None = None,
        iterative: bool = False,
    ):
        """
        Args:
          documents, tasks, images: checkpoints, see `trained.load`; all for the same base model.
          captioner: what shows images to the checkpoint `images`; empty if that reads them itself.
          base: that model or its name, if no checkpoint shall say.
          quantization: of the base model, see `load_base`; None for that of the training.
          iterative: internalise with less memory, more slowly.
        """
        self._documents, self._tasks = documents, tasks
        self._images, self._captioner = images, captioner
        self._quantization, self._iterative = quantization, iterative
        if isinstance(base, str):
            base = load_base(base, quantization=quantization or 'none')
        self._base = base

    @functools.cached_property
    def internalizer(self) -> Internalizer:
        """Raises UserError: see `trained.load` and `Internalizer`."""
        return Internalizer(self._load(self._documents), self._iterative)

    @functools.cached_property
    def specializer(self) -> Specializer:
        """Raises UserError: see `trained.load` and `Specializer`."""
        return Specializer(self._load(self._tasks))

    @functools.cached_property
    def image_internalizer(self) -> ImageInternalizer:
        """Raises UserError: see `trained.load` and `ImageInternalizer`."""
        captioner = self._load(self._captioner) if self._captioner else None
        return ImageInternalizer(self._load(self._images), captioner)

    @property
    def base(self) -> BaseModel:
        """The frozen model."""
        return self._base or self.internalizer.trained.base

    def _load(self, checkpoint: str) -> trained.Trained:
        model = trained.load(checkpoint, self._base, self._quantization)
        self._base = model.base
        return model

    # ---- teach

    def internalize(
        self, text: str, report: Callable[[float], None] = lambda done: None
    ) -> Adapter:
        """A document -> what the model knows of it afterwards.

        Args:
          report: hears, as the document is read, which fraction of it is.

        Raises:
          UserError: the document is empty.
        """
        lora = self.internalizer(self.tokens(text), report)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self._adapter(lora, self._documents, document_sha256=digest)

    def internalize_image(self, image: str | Path | bytes) -> Adapter:
        """An image (a file, or its contents) -> what the model, which sees none, knows of it.

        Raises:
          UserError: not an image that can be read; see `images.read`.
        """
        image = images.read(image, on_white=True)
        lora = self.image_internalizer(self.image_internalizer.contexts([image]))
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return self._adapter(lora, self._images, image_sha256=digest)

    def specialize(self, description: str) -> Adapter:
        """A task in words -> the model's specialisation to it.

        Raises:
          UserError: the description is empty or too long.
        """
        return self.specialize_all([description])[0]

    def specialize_all(self, descriptions: Sequence[str]) -> list[Adapter]:
        """As `specialize`, many in one call."""
        loras = self.specializer(descriptions)
        return [
            self._adapter(
                loras.replace(pairs=jax.tree.map(lambda x, i=i: x[:, i : i + 1], loras.pairs)),
                self._tasks,
                task=description,
            )
            for i, description in enumerate(descriptions)
        ]

    def memory(self) -> Memory:
        """For several documents in one model, which come and go; its `lora()` can be asked."""
        return Memory(self.internalizer)

    def compose(self, *parts: Adapter | Lora, scales: Sequence[float] | None = None) -> Adapter:
        """The sum of adapters, each scaled. (Documents that shall share the model are better kept
        in a `memory`: there, what all documents have in common counts once.)

        Raises:
          ValueError: no part, or another number of scales.
        """
        scales = [1.0] * len(parts) if scales is None else scales
        # Into B: a sum is relative to the scaling of its first part, which must not be 0.
        scaled = [
            lora_lib.fold(_lora(part), jnp.full((1, 1), scale))
            for part, scale in zip(parts, scales, strict=True)
        ]
        names = [
            part.metadata.get('hypernetwork', '') for part in parts if isinstance(part, Adapter)
        ]
        lora = lora_lib.compact(lora_lib.concatenate(*scaled))
        return self._adapter(lora, ' + '.join(filter(None, names)))

    # ---- ask

    def tokens(self, text: str) -> list[int]:
        """The tokens of a document for the model that reads it."""
        return self.internalizer.trained.hypernetwork.encoder.tokenizer.encode(text)

    def ask(
        self,
        question: str,
        adapter: Adapter | Lora | None = None,
        max_new_tokens: int = 64,
        document: str = '',
    ) -> str:
        """The greedy answer of the model, as it is without an adapter.

        Args:
          document: a text to put into the prompt, cut to the window.

        Raises:
          UserError: the question does not fit into the window.
        """
        return self.ask_all([question], adapter, max_new_tokens, document)[0]

    def ask_all(
        self,
        questions: Sequence[str],
        adapter: Adapter | Lora | None = None,
        max_new_tokens: int = 64,
        document: str = '',
    ) -> list[str]:
        """As `ask`, in batches."""
        if not questions:
            return []
        prompts = [self.prompt(question, max_new_tokens, document) for question in questions]
        return generation.answer_in_batches(self.base, prompts, max_new_tokens, _lora(adapter))

    def stream(
        self,
        question: str,
        adapter: Adapter | Lora | None = None,
        max_new_tokens: int = 64,
        document: str = '',
    ) -> Iterator[str]:
        """As `ask`, in pieces as they come."""
        prompt = self.prompt(question, max_new_tokens, document)
        return generation.stream(self.base, prompt, max_new_tokens, _lora(adapter))

    def cache_nbytes(self, document: str) -> int:
        """Bytes of the KV cache of a text, which its LoRA stands in for."""
        return self.base.cache_nbytes(len(self.base.tokenizer.encode(document)))

    def prompt(self, question: str, max_new_tokens: int, document: str = '') -> list[int]:
        """Tokens of a question in the chat template, perhaps with a document before it."""
        tokenizer = self.base.tokenizer
        if not document:
            return tokenizer.prompt(question)
        return in_context_prompt(self.base, tokenizer.encode(document), question, max_new_tokens)

    # ---- keep

    def save(self, adapter: Adapter, directory: str | Path) -> None:
        """Writes PEFT's layout to a folder; see `adapters.save`."""
        adapters.save(adapter.lora, directory, self.base.name, adapter.metadata)

    def save_merged(
        self, adapter: Adapter | Lora, directory: str | Path, dtype: str = 'float32'
    ) -> None:
        """Writes base model and adapter, summed in f32, as a Hugging Face folder.

        Nothing is left behind if writing fails. config.json comes last: a folder without it is
        not complete.

        Args:
          directory: an existing folder.
          dtype: of the file.

        Raises:
          UserError: the base model is quantized, no config.json can say what it is, the folder
            cannot be written to, or the disk is full.
        """
        directory, base = Path(directory), self.base
        merged = lora_lib.merge(base.params, _lora(adapter))
        params = jax.tree.map(lambda x: x.astype(dtype), merged)
        # Of both names the newer one counts, which is that of the base model's own weights.
        config = {k: v for k, v in hf_config(base).items() if k != 'dtype'} | {'torch_dtype': dtype}
        # Where our answers end: config.json may name another token, or none.
        generation_config = json.dumps({'eos_token_id': base.tokenizer.eos_id}) + '\n'
        try:
            with tempfile.TemporaryDirectory(dir=directory, prefix='.partial-') as partial:
                base.tokenizer.save(partial)
                Path(partial, 'generation_config.json').write_text(generation_config)
                weights.save_hf(partial, params, base.config, config)
                for path in sorted(Path(partial).iterdir(), key=lambda p: p.name == 'config.json'):
                    path.replace(directory / path.name)
        except OSError as e:
            raise UserError(f'cannot write a model to {directory} ({e})') from e

    def load(self, directory: str | Path) -> Adapter:
        """Reads an adapter that `save` or PEFT wrote.

        Raises:
          UserError: damaged files, or another base model; see `adapters.load`.
        """
        lora = adapters.load(directory, self.base.config, self.base.fingerprint)
        return Adapter(lora, adapters.read_metadata(directory))

    def _adapter(self, lora: Lora, hypernetwork: str, **source: str) -> Adapter:
        fingerprint = self.base.fingerprint
        return Adapter(
            jax.block_until_ready(lora),
            {'base_fingerprint': fingerprint, 'hypernetwork': hypernetwork, **source},
        )


def _lora(adapter: Adapter | Lora | None) -> Lora | None:
    return adapter.lora if isinstance(adapter, Adapter) else adapter
