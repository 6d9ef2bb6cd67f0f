"""Text to tokens and back, with the chat template of the base model."""

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, pre_tokenizers

from hyperlora.errors import UserError

_PRE_TOKENIZERS = {
    'smollm': lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level()]
    ),
}
_CONTROL = 3  # in tokenizer.ggml.token_type
_HOLE = '\ue000content\ue000'  # private-use characters: no template holds this string
_DEFAULT_SYSTEM = re.compile(
    r"\{%-? if loop\.first and messages\[0\]\['role'\] != 'system' -?%\}.*?\{%-? endif -?%\}",
    re.DOTALL,
)


class Tokenizer:
    """A `tokenizers.Tokenizer` with the chat template of its model.

    Control tokens come from the template alone: in the text of a user they are mere text.
    `eos_id` is the token that ends an answer.
    """

    def __init__(self, backend: tokenizers.Tokenizer, template: str, eos_id: int):
        """Takes over `backend`, whose control tokens must be added special tokens.

        Raises UserError if the template cannot be rendered with a single user message.
        """
        self.eos_id = eos_id
        self._backend = backend
        self._frames = {
            True: self._frame(template),
            False: self._frame(_DEFAULT_SYSTEM.sub('', template)),
        }
        backend.encode_special_tokens = True  # as mere text; the frames are already encoded

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> 'Tokenizer':
        """Builds the byte-level BPE that the metadata of a GGUF file describes.

        Raises UserError if a field is missing or the way to split words is not supported.
        """
        names = {
            'pre': 'tokenizer.ggml.pre',
            'tokens': 'tokenizer.ggml.tokens',
            'token_type': 'tokenizer.ggml.token_type',
            'merges': 'tokenizer.ggml.merges',
            'eos_id': 'tokenizer.ggml.eos_token_id',
            'template': 'tokenizer.chat_template',
        }
        missing = [name for name in names.values() if name not in fields]
        if missing:
            raise UserError(f'the GGUF file lacks {", ".join(missing)}')
        pre, tokens, kinds, merges, eos_id, template = (fields[name] for name in names.values())
        if pre not in _PRE_TOKENIZERS:
            known = ', '.join(_PRE_TOKENIZERS)
            raise UserError(f'{names["pre"]} {pre!r} is not supported (only {known})')
        vocabulary = {token: index for index, token in enumerate(tokens)}
        # No unknown token: it would be a control token that user text could bring about.
        backend = tokenizers.Tokenizer(
            models.BPE(vocab=vocabulary, merges=[tuple(merge.split(' ')) for merge in merges])
        )
        backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
        backend.decoder = decoders.ByteLevel()
        control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
        backend.add_special_tokens(control)
        return cls(backend, template, eos_id)

    def encode(self, text: str) -> list[int]:
        """The tokens of `text`, [s]: no control tokens, not even where it spells one out.

        Characters whose bytes are not in the vocabulary (a few ASCII control codes) are dropped.
        """
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of tokens [s], without the control tokens unless `skip_special` is false."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def prompt(self, question: str, default_system: bool = False) -> list[int]:
        """The tokens [s] that ask the model to answer `question`: its template, rendered.

        With `default_system` the system message that the template puts in by default stays.
        """
        start, lead, tail, end = self._frames[default_system]
        return [*start, *self.encode(lead + question + tail), *end]

    @functools.cached_property
    def boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """Where sentences can part: two bool arrays over the vocabulary, [v] each.

        The first is true for tokens that end a sentence or a line, the second for tokens that
        begin with white space, as what follows a sentence does.
        """
        texts = [self._backend.decode([i]) for i in range(self._backend.get_vocab_size())]
        ends = np.array([t.rstrip('"\')]').endswith(('.', '!', '?', '\n')) for t in texts])
        starts = np.array([t[:1].isspace() for t in texts])
        return ends, starts

    def _frame(self, template: str) -> tuple[list[int], str, str, list[int]]:
        # What surrounds the content up to the next control token stays text, to be encoded with
        # it: so the tokens are those of the whole, even if BPE merges across the seam.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            rendered = environment.from_string(template).render(
                messages=[{'role': 'user', 'content': _HOLE}], add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise UserError(f'cannot render the chat template: {error}') from error
        if rendered.count(_HOLE) != 1:
            raise UserError("the chat template does not give the user's message just once")
        before, after = rendered.split(_HOLE)
        added = self._backend.get_added_tokens_decoder().values()
        control = re.compile('|'.join(re.escape(token.content) for token in added))
        seam = max((match.end() for match in control.finditer(before)), default=0)
        match = control.search(after)
        resume = match.start() if match else len(after)
        start, end = (self.encode(text) for text in (before[:seam], after[resume:]))
        return start, before[seam:], after[:resume], end


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
