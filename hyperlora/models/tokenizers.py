"""Text to tokens and back, with the chat template of the base model."""

import datetime
import functools
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import tokenizers
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import decoders, models, normalizers, pre_tokenizers

from hyperlora.errors import UserError

_NORMAL, _CONTROL, _USER_DEFINED = 1, 3, 4  # in tokenizer.ggml.token_type
_SPACE = '\u2581'  # SentencePiece's mark of a space
_HOLE = '\ue000content\ue000'  # private-use characters: no template holds this string
_DEFAULT_SYSTEM = re.compile(
    r"\{%-? if loop\.first and messages\[0\]\['role'\] != 'system' -?%\}.*?\{%-? endif -?%\}",
    re.DOTALL,
)


def encode(backend: tokenizers.Tokenizer, text: str, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text, [s]; UserError if it is not valid Unicode."""
    try:
        return backend.encode(text, add_special_tokens=add_special_tokens).ids
    except TypeError as error:
        raise UserError(
            f'a text holds half a character, which no UTF-8 does: {text[:60]!r}'
        ) from error


class Tokenizer:
    """A `tokenizers.Tokenizer` with the chat template of its model.

    Control tokens come from the template alone: in the text of a user they are mere text.
    `eos_id` is the token that ends an answer: the one that the template puts after it.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        template: str,
        names: Mapping[str, str] | None = None,
    ):
        """Takes over `backend`, whose control tokens must be added special tokens.

        Args:
          template: Jinja source of the chat template.
          names: other variables of the template, such as `bos_token`.

        Raises:
          UserError: the template cannot be rendered, or does not tell how an answer ends.
        """
        self._backend, self._template = backend, template
        self._names = dict(names or {})
        self._frames = {
            True: self._frame(template),
            False: self._frame(_DEFAULT_SYSTEM.sub('', template)),
        }
        self.eos_id = self._end_of_answer(template)
        backend.encode_special_tokens = True  # as mere text; the frames are already encoded

    @classmethod
    def from_gguf(cls, fields: Mapping[str, Any]) -> 'Tokenizer':
        """Builds the BPE, of bytes or of SentencePiece, that the metadata of a GGUF file describes.

        Raises UserError if a field is missing or the kind of tokenizer is not supported.
        """
        model, tokens, kinds, template = _gguf(
            fields, 'ggml.model', 'ggml.tokens', 'ggml.token_type', 'chat_template'
        )
        if model not in _BACKENDS:
            known = ', '.join(_BACKENDS)
            raise UserError(f'tokenizer.ggml.model {model!r} is not supported (only {known})')
        backend = _BACKENDS[model](fields)
        by_kind: dict[int, list[str]] = {}
        for token, kind in zip(tokens, kinds, strict=True):
            by_kind.setdefault(kind, []).append(token)
        backend.add_special_tokens(by_kind.get(_CONTROL, []))
        backend.add_tokens(
            [tokenizers.AddedToken(t, normalized=False) for t in by_kind.get(_USER_DEFINED, [])]
        )
        names = {}
        for name in ('bos', 'eos'):
            index = fields.get(f'tokenizer.ggml.{name}_token_id')
            if index is not None:
                names[f'{name}_token'] = tokens[index]
        return cls(backend, template, names)

    @classmethod
    def from_hf(cls, directory: str | Path) -> 'Tokenizer':
        """Reads tokenizer.json and the chat template of a Hugging Face model folder.

        Raises:
          UserError: a file is missing or damaged, or there is no usable chat template.
        """
        directory = Path(directory)
        path = directory / 'tokenizer.json'
        try:
            backend = tokenizers.Tokenizer.from_str(path.read_text(encoding='utf-8'))
            path = directory / 'tokenizer_config.json'
            settings = json.loads(path.read_text(encoding='utf-8'))
            path = directory / 'chat_template.jinja'
            template = path.read_text(encoding='utf-8') if path.is_file() else None
        except FileNotFoundError as e:
            raise UserError(f'{path} is missing; download the model again') from e
        except Exception as e:  # tokenizers raises bare Exceptions
            raise UserError(f'cannot read {path}: {e}') from e
        template = template or settings.get('chat_template')
        if isinstance(template, list):  # several, by name
            template = {t['name']: t['template'] for t in template}.get('default')
        if not template:
            raise UserError(
                f'{directory} has no chat template (chat_template.jinja, or chat_template in '
                'tokenizer_config.json); use an instruction-tuned model'
            )
        names = {
            key: value['content'] if isinstance(value, dict) else value
            for key, value in settings.items()
            if key.endswith('_token') and isinstance(value, str | dict)
        }
        return cls(backend, template, names)

    def save(self, directory: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as `from_hf` and transformers read.

        Raises:
          OSError: they cannot be written.
        """
        settings = {
            'tokenizer_class': 'PreTrainedTokenizerFast',
            'chat_template': self._template,
            'eos_token': self._backend.id_to_token(self.eos_id),
            **self._names,
        }
        self._backend.encode_special_tokens = False
        try:
            backend = self._backend.to_str(pretty=True)
        finally:
            self._backend.encode_special_tokens = True
        (Path(directory) / 'tokenizer.json').write_text(backend, encoding='utf-8')
        text = json.dumps(settings, indent=2, ensure_ascii=False) + '\n'
        (Path(directory) / 'tokenizer_config.json').write_text(text, encoding='utf-8')

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The tokens of `text`, [s]: no control tokens, not even where it spells one out.

        Characters whose bytes are not in the vocabulary (a few ASCII control codes) are dropped.
        With `add_special_tokens` come those that tokenizer.json puts around a text, such as a
        first one.

        Raises:
          UserError: a text that is not valid Unicode.
        """
        return encode(self._backend, text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of tokens [s], without the control tokens unless `skip_special` is false."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def prompt(self, question: str, default_system: bool = False) -> list[int]:
        """The tokens [s] that ask the model to answer `question`: its template, rendered.

        With `default_system` the system message that the template puts in by default stays.
        """
        start, lead, tail, end = self._frames[default_system]
        return [*start, *self.encode(lead + question + tail), *end]

    @property
    def answer_start(self) -> list[int]:
        """The tokens [s] between a question and its answer, as `prompt` ends with."""
        return list(self._frames[False][3])

    @functools.cached_property
    def boundaries(self) -> tuple[np.ndarray, np.ndarray]:
        """Where sentences can part: two bool arrays over the vocabulary, [v] each.

        The first is true for tokens that end a sentence or a line, the second for tokens that
        begin with white space, as what follows a sentence does.
        """
        texts = [self._backend.decode([i]) for i in range(self._backend.get_vocab_size())]
        ends = np.array([t.rstrip('"\')]').endswith(('.', '!', '?', '\n')) for t in texts])
        pieces = [self._backend.id_to_token(i) or '' for i in range(len(texts))]
        starts = np.array(
            [
                # SentencePiece's mark is dropped when a token is decoded alone.
                text[:1].isspace() or piece.startswith(_SPACE)
                for text, piece in zip(texts, pieces, strict=True)
            ]
        )
        return ends, starts

    def _render(self, template: str, messages: list[dict[str, str]], **kwargs) -> str:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
        )
        environment.globals['raise_exception'] = _raise
        environment.globals['strftime_now'] = lambda form: datetime.date.today().strftime(form)
        try:
            return environment.from_string(template).render(
                messages=messages, **self._names, **kwargs
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(f'cannot render the chat template: {error}') from error

    def _control(self) -> re.Pattern:
        added = self._backend.get_added_tokens_decoder().values()
        return re.compile('|'.join(re.escape(token.content) for token in added if token.special))

    def _end_of_answer(self, template: str) -> int:
        messages = [
            {'role': 'user', 'content': 'question'},
            {'role': 'assistant', 'content': _HOLE},
        ]
        after = self._render(template, messages).split(_HOLE)[-1]
        match = self._control().search(after)
        if not match:
            raise UserError('the chat template puts no control token after an answer')
        return self._backend.token_to_id(match.group())

    def _frame(self, template: str) -> tuple[list[int], str, str, list[int]]:
        # What surrounds the content up to the next control token stays text, to be encoded with
        # it: so the tokens are those of the whole, even if BPE merges across the seam.
        messages = [{'role': 'user', 'content': _HOLE}]
        rendered = self._render(template, messages, add_generation_prompt=True)
        if rendered.count(_HOLE) != 1:
            raise UserError("the chat template does not give the user's message just once")
        before, after = rendered.split(_HOLE)
        control = self._control()
        seam = max((match.end() for match in control.finditer(before)), default=0)
        match = control.search(after)
        resume = match.start() if match else len(after)
        start, end = (self.encode(text) for text in (before[:seam], after[resume:]))
        return start, before[seam:], after[:resume], end


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _gguf(fields: Mapping[str, Any], *names: str) -> list[Any]:
    missing = [f'tokenizer.{name}' for name in names if f'tokenizer.{name}' not in fields]
    if missing:
        raise UserError(f'the GGUF file lacks {", ".join(missing)}')
    return [fields[f'tokenizer.{name}'] for name in names]


def _byte_bpe(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BPE of bytes by its list of merges, as GPT-2's."""
    pre, tokens, merges = _gguf(fields, 'ggml.pre', 'ggml.tokens', 'ggml.merges')
    if pre not in _PRE_TOKENIZERS:
        known = ', '.join(_PRE_TOKENIZERS)
        raise UserError(f'tokenizer.ggml.pre {pre!r} is not supported (only {known})')
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # No unknown token: it would be a control token that user text could bring about.
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[tuple(merge.split(' ')) for merge in merges])
    )
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BPE by the scores of its pieces, with bytes for other characters, as Gemma's and Llama 2's.

    Of two pieces that could be merged, the one of the higher score is; only normal pieces are.
    """
    tokens, kinds, scores = _gguf(fields, 'ggml.tokens', 'ggml.token_type', 'ggml.scores')
    vocabulary = {token: index for index, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, kinds, strict=True) if kind == _NORMAL}
    pairs = [
        (scores[vocabulary[token]], at, token)
        for token in normal
        for at in range(1, len(token))
        if token[:at] in normal and token[at:] in normal
    ]
    merges = [(token[:at], token[at:]) for _, at, token in sorted(pairs, reverse=True)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True))
    prefix = fields.get('tokenizer.ggml.add_space_prefix', True)
    spaces = normalizers.Replace(' ', _SPACE)
    backend.normalizer = (
        normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefix else spaces
    )
    steps = [decoders.Replace(_SPACE, ' '), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(' ', left=1)] * prefix)
    return backend


_BACKENDS = {'gpt2': _byte_bpe, 'llama': _sentencepiece}  # by tokenizer.ggml.model


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Words by a regular expression, then bytes."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(pattern), 'isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


# How words are split before BPE, by `tokenizer.ggml.pre`. Llama 3's numbers are of up to three
# digits, Qwen's of one.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}|"
    r' ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_PRE_TOKENIZERS = {
    'smollm': lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level()]
    ),
    'llama-bpe': lambda: _split(_WORDS.format(digits='{1,3}')),
    'qwen2': lambda: _split(_WORDS.format(digits='')),
}
