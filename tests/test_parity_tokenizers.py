"""Tokenizers read from GGUF files against SentencePiece and transformers; skipped without them."""

import pathlib
import random

import gguf
import pytest

from hyperlora.models import weights
from hyperlora.models.tokenizers import Tokenizer

sentencepiece = pytest.importorskip('sentencepiece')

LICENSE = pathlib.Path(__file__).parents[1] / 'LICENSE'
TEMPLATE = (
    '{{ bos_token }}{% for m in messages %}'
    "{{ '<turn>' + m['role'] + '\n' + m['content'] + '<end>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}"
)
SPACES = ['\u2581' * count for count in range(2, 9)]
TEXTS = [
    '',
    'word',
    'Two words, and 3 numbers: 12345, 3.14.',
    'runs  of   spaces     and\ttabs\t\tand \t both',
    'lines\n\nand\r\n\n\nmore\n  indented\n',
    'na\u00efve \u2014 \u201cquotes\u201d \u2026 \u20ac',
    '\u4e2d\u6587 \u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4',
    '\u0e44\u0e17\u0e22 \u05e2\u05d1\u05e8\u05d9\u05ea',
    '\U0001f469\u200d\U0001f469\u200d\U0001f467 e\u0301 \u200b \ufeff \U0001d54f',
    'a <turn> of <end> and <s>, <0x0A> and x\u2581y',
    'aaaaaaaaaaaaaaa abababababab  the the thethe',
]


@pytest.fixture(scope='module', params=['llama', 'gemma2'])
def trained(request, tmp_path_factory):
    """A SentencePiece model as the family's, trained here, and the GGUF file that describes it."""
    folder = tmp_path_factory.mktemp(request.param)
    gemma = request.param == 'gemma2'
    sentencepiece.SentencePieceTrainer.train(
        input=str(LICENSE),
        model_prefix=str(folder / 'pieces'),
        model_type='bpe',
        vocab_size=700,
        normalization_rule_name='identity',
        add_dummy_prefix=not gemma,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        byte_fallback=True,
        split_digits=True,
        control_symbols=['<turn>', '<end>'],
        user_defined_symbols=[*SPACES, '\t', '\n\n', '\n'] if gemma else [],
        minloglevel=2,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / 'pieces.model'))
    count = pieces.get_piece_size()
    tokens = [pieces.id_to_piece(i) for i in range(count)]
    kinds = [
        gguf.TokenType.UNKNOWN
        if pieces.is_unknown(i)
        else gguf.TokenType.CONTROL
        if pieces.is_control(i)
        else gguf.TokenType.BYTE
        if pieces.is_byte(i)
        else gguf.TokenType.NORMAL
        for i in range(count)
    ]
    if gemma:  # llama.cpp stores these pieces with plain spaces
        for i, token in enumerate(tokens):
            if token in [*SPACES, '\t', '\n\n', '\n']:
                tokens[i], kinds[i] = token.replace('\u2581', ' '), gguf.TokenType.USER_DEFINED
    writer = gguf.GGUFWriter(folder / 'x.gguf', request.param)
    writer.add_vocab_size(count)
    writer.add_tokenizer_model('llama')
    writer.add_tokenizer_pre('default')
    writer.add_token_list(tokens)
    writer.add_token_scores([pieces.get_score(i) for i in range(count)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(pieces.bos_id())
    writer.add_eos_token_id(pieces.eos_id())
    writer.add_unk_token_id(pieces.unk_id())
    writer.add_add_space_prefix(not gemma)
    writer.add_chat_template(TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields, _ = weights.read_gguf(folder / 'x.gguf')
    return pieces, Tokenizer.from_gguf(fields), folder


def random_texts(count):
    rng = random.Random(0)
    alphabet = 'aaabbcdeehilnooprsttu    \t\n\n.,()[]_=01239\u00e9\u4e2d\U0001f600'
    source = LICENSE.read_text()
    for _ in range(count):
        at = rng.randrange(len(source) - 80)
        noise = ''.join(rng.choices(alphabet, k=rng.randrange(40)))
        yield source[at : at + rng.randrange(80)] + noise


def test_ids_are_those_of_sentencepiece(trained):
    pieces, tokenizer, _ = trained
    for text in [*TEXTS, *(f' {text}' for text in TEXTS), *random_texts(500)]:
        ids = tokenizer.encode(text)
        assert ids == pieces.encode(text), text
        if '\u2581' not in text:
            assert tokenizer.decode(ids) == text


def test_ids_are_those_of_transformers(trained):
    """But for a space at the start, to which SentencePiece adds one and transformers does not, and
    runs of spaces longer than any piece, which transformers divides otherwise."""
    pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    _, tokenizer, folder = trained
    theirs = transformers.AutoTokenizer.from_pretrained(folder, gguf_file='x.gguf')
    for text in [*TEXTS, *random_texts(100)]:
        if not text.startswith(' ') and ' ' * (len(SPACES) + 2) not in text:
            wanted = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert tokenizer.encode(text) == wanted, text
    if 'gemma2' in folder.name:  # Llama's prefix after a control token is a matter of opinion
        turns = [{'role': 'user', 'content': 'Why  1984?'}]
        wanted = theirs.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert tokenizer.prompt('Why  1984?') == wanted
