"""Needle in a haystack: examples, chunks and the configs of the experiment."""

import dataclasses
import math
import re

import jax
import numpy as np
import pytest
from conftest import CharTokenizer, tiny_base

from configs import d2l_niah
from d2l import chunking, haystacks, niah
from hyperlora import data, hypernetwork
from hyperlora.errors import UserError
from hyperlora.meta_learning import make_optimizer
from hyperlora.models.base import BaseModel
from hyperlora.models.families import DecoderConfig, Rope
from hyperlora.objectives import OBJECTIVES

NEEDLE = re.compile(r'The special magic number is (\d+)\.')
MIXED = {'grass': 1.0, 'varied': 1.0}
STAGE = {
    'steps': 3,
    'contexts': 3,
    'own_weight': 1.0,
    'tokens': (40, 300),
    'chunk_length': 300,
    'chunks': (0.0, 0.0, 1.0),
    'pool': 2,
    'max_repeats': 8,
    'question': 'Number?',
    'haystacks': MIXED,
}


def groups(*stages, seed=0, per_step=2):
    return niah.NeedleGroups(
        CharTokenizer(),
        CharTokenizer(),
        [{**STAGE, **stage} for stage in stages],
        seed,
        per_step,
    )


def texts(context):
    return [
        CharTokenizer().decode(tokens[mask])
        for tokens, mask in zip(context['tokens'], context['mask'], strict=True)
    ]


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# ---------------------------------------------------------------------------------- examples


def test_an_item_depends_on_seed_and_index_alone():
    one, two = groups({}), groups({})
    forwards = [one[i] for i in range(len(one))]
    assert len(forwards) == 6
    for i in reversed(range(6)):
        assert same(two[i], forwards[i])
        assert not same(groups({}, seed=1)[i], forwards[i])
        assert all(not same(forwards[i], forwards[j]) for j in range(i))


def test_each_context_holds_its_needle_once():
    for index in range(6):
        item = groups({})[index]
        chunks, query = texts(item['context']), item['query']
        assert len(chunks) == 3 * 3 + 2
        for i in range(3):
            own = chunks[3 * i : 3 * i + 3]
            needles = [NEEDLE.findall(chunk) for chunk in own]
            assert sum(map(len, needles)) == 1  # whole, in one chunk
            number = max(needles)[0]
            answer = CharTokenizer().decode(query['labels'][i])
            assert answer == number and len(number) == 4
            np.testing.assert_array_equal(
                query['chunk_weights'][i, :9],
                np.repeat(np.eye(3)[i], 3) * item['context']['mask'][:9].any(1),
            )
        assert not any('magic' in chunk for chunk in chunks[9:])


def test_the_pool_is_counted_up_to_max_repeats():
    weights = np.concatenate(
        [groups({'steps': 50})[i]['query']['chunk_weights'][:, 9:].ravel() for i in range(100)]
    )
    assert set(weights) == set(range(9))  # 0 to max_repeats, whole numbers
    assert 0.2 < (weights == 0).mean() < 0.8


def test_labels_follow_their_positions():
    query = groups({})[0]['query']
    tokens, labels, positions = (query[k] for k in ('tokens', 'labels', 'label_positions'))
    prompt = CharTokenizer().prompt('Number?')
    for i in range(3):
        assert tokens[i, : len(prompt)].tolist() == prompt
        assert positions[i, 0] == len(prompt) - 1  # the prompt's last token predicts the first
        # What follows a label's position is that label; the last one ends the answer.
        np.testing.assert_array_equal(tokens[i, positions[i, :-1] + 1], labels[i, :-1])
        assert positions[i, -1] == tokens.shape[1] - 1
        assert CharTokenizer().decode(tokens[i, len(prompt) :]).isdigit()
        assert labels[i, -1] == CharTokenizer.eos_id
        np.testing.assert_allclose(query['label_weights'][i], 1 / 5)


def test_digits_are_balanced():
    rng = np.random.default_rng(0)
    numbers = np.asarray([list(niah.random_numbers(rng, 10)) for _ in range(200)])
    digits = np.asarray([[list(number) for number in batch] for batch in numbers]).astype(int)
    assert digits.shape == (200, 10, 4)
    assert (np.sort(digits, axis=1) == np.arange(10)[:, None]).all()  # each once at each place
    # Within a batch, places are independent of each other.
    assert abs(np.corrcoef(digits[..., 0].ravel(), digits[..., 1].ravel())[0, 1]) < 0.1


def test_own_weight_0_leaves_the_documents_out():
    weights = groups({'own_weight': 0.0})[0]['query']['chunk_weights']
    assert not weights[:, :9].any()


def test_an_empty_chunk_counts_nothing():
    source = groups({'tokens': (0, 60), 'steps': 20})
    empty = 0
    for i in range(40):
        item = source[i]
        absent = ~item['context']['mask'].any(1)
        empty += absent.sum()
        assert not item['query']['chunk_weights'][:, absent].any()
    assert empty > 0


def test_stages_follow_each_other():
    stages = [
        {
            'steps': 2,
            'contexts': 1,
            'chunk_length': 64,
            'tokens': (0, 0),
            'pool': 0,
            'chunks': (1.0,),
        },
        {'steps': 3, 'contexts': 2},
    ]
    source = groups(*stages)
    assert len(source) == 2 * 5
    shapes = [source[i]['context']['tokens'].shape for i in range(10)]
    assert shapes == [(1, 64)] * 4 + [(2 * 3 + 2, 300)] * 6
    with pytest.raises(IndexError):
        source[10]
    # Length 0: the needle and nothing else.
    assert all(NEEDLE.fullmatch(texts(source[i]['context'])[0]) for i in range(4))


def test_groups_of_a_step_have_one_shape():
    source = groups({'steps': 20, 'chunks': (0.5, 0.5)})
    shapes = [source[i]['context']['tokens'].shape for i in range(40)]
    assert shapes[::2] == shapes[1::2]
    assert set(shapes) == {(3 + 2, 300), (6 + 2, 300)}


def test_documents_have_the_lengths_asked_for():
    writer, rng = niah.Writer(CharTokenizer()), np.random.default_rng(0)
    needle = niah.NEEDLE.format(1234)
    for length in (0, 40, 100, 500):
        document = writer.write(rng, haystacks.grass, length, needle)
        assert document.tokens[-1] == ord('.')
        assert max(length - 30, len(needle)) <= len(document.tokens) <= max(length, len(needle))
    for depth, place in ((0, 0), (1, -1)):
        document = writer.write(rng, haystacks.grass, 200, needle, depth)
        assert CharTokenizer().decode(document.sentences[place]).strip() == needle
        assert len(document.sentences) > 5


def test_line_breaks_that_are_tokens_take_room():
    class Merging(CharTokenizer):
        """As byte pairs do: a space is part of the word after it, a line break is not."""

        def encode(self, text):
            return super().encode(text.removeprefix(' '))

    writer, rng = niah.Writer(Merging()), np.random.default_rng(0)
    needle = niah.NEEDLE.format(1234)
    for length in range(100, 160):
        document = writer.write(rng, haystacks.grass, length, needle, 1.0, line_breaks=1.0)
        assert len(document.tokens) <= length
        assert CharTokenizer().decode(document.tokens).endswith('1234.')


def test_batches_stack_microbatches_and_groups():
    config = d2l_niah.get_config('tiny').data
    config.stages = [STAGE]
    batches = data.build(config, tiny_base(), tiny_base(), 0, groups=2, accumulate=2)
    assert len(batches) == 3
    batch, source = batches[1], groups({}, per_step=4)
    assert batch['context']['tokens'].shape == (2, 2 * 11, 300)
    assert batch['query']['chunk_weights'].shape == (2, 2 * 3, 11)
    for a in range(2):
        for g in range(2):
            item = source[4 + 2 * a + g]
            np.testing.assert_array_equal(
                batch['context']['tokens'][a, 11 * g : 11 * g + 11], item['context']['tokens']
            )
            np.testing.assert_array_equal(
                batch['query']['labels'][a, 3 * g : 3 * g + 3], item['query']['labels']
            )


# ---------------------------------------------------------------------------------- haystacks


@pytest.mark.parametrize('name', haystacks.HAYSTACKS)
def test_haystacks_are_sentences(name):
    sentences = haystacks.get(name)(np.random.default_rng(0), 40)
    assert len(sentences) == 40
    assert all(s[-1] in '.!?' and s == ' '.join(s.split()) for s in sentences)
    assert sentences == haystacks.get(name)(np.random.default_rng(0), 40)
    others = [haystacks.get(name)(np.random.default_rng(seed), 40) for seed in range(1, 9)]
    assert any(sentences != other for other in others)


def test_a_text_file_is_a_haystack(tmp_path):
    path = tmp_path / 'prose.txt'
    lines = [f'Sentence number {i} is here.' for i in range(12)]
    path.write_text('\n'.join(lines))
    drawn = haystacks.get(str(path))(np.random.default_rng(0), 13)
    start = lines.index(drawn[0])
    assert drawn == [lines[(start + i) % 12] for i in range(13)]
    path.write_text('Too short.')
    with pytest.raises(UserError, match='at least 10'):
        haystacks.get(str(path))
    with pytest.raises(UserError, match='neither grass'):
        haystacks.get('nonsense')


# ----------------------------------------------------------------------------------- chunking


def documents():
    writer, rng = niah.Writer(CharTokenizer()), np.random.default_rng(0)
    for length in (0, 90, 400, 3000):
        for name in MIXED:
            yield writer.write(
                rng, haystacks.get(name), length, niah.NEEDLE.format(1234), line_breaks=0.2
            )


@pytest.mark.parametrize('limit', [80, 150, 1024])
def test_chunks_are_whole_sentences(limit):
    counts = []
    for document in documents():
        tokens = document.tokens
        chunks = chunking.split(tokens, CharTokenizer(), limit)
        assert [token for chunk in chunks for token in chunk] == tokens
        assert all(0 < len(chunk) <= limit for chunk in chunks)
        counts.append(len(chunks))
        found = [NEEDLE.findall(CharTokenizer().decode(chunk)) for chunk in chunks]
        assert sum(found, []) == ['1234']
        if max(map(len, document.sentences)) <= limit // 2:
            assert all(chunk[-1] in b'.!?' for chunk in chunks)
    assert min(counts) == 1 and max(counts) >= 3


def test_chunks_are_filled():
    """A cut falls into the second half of the window: chunks are few."""
    document = list(documents())[-2].tokens
    chunks = chunking.split(document, CharTokenizer(), 200)
    assert all(100 < len(chunk) <= 200 for chunk in chunks[:-1])


def test_without_sentence_ends_the_cut_is_hard():
    tokens = list(b'no end in sight ' * 10)
    chunks = chunking.split(tokens, CharTokenizer(), 64)
    assert [len(chunk) for chunk in chunks] == [64, 64, 32]
    assert sum(chunks, []) == tokens
    # A point inside a number is no end of a sentence.
    tokens = list(b'3.1415926 ' * 10)
    assert len(chunking.split(tokens, CharTokenizer(), 33)[0]) == 33


def test_a_document_that_fits_is_one_chunk():
    tokens = list(b'One. Two. Three.')
    assert chunking.split(tokens, CharTokenizer(), len(tokens)) == [tokens]
    assert chunking.split(tokens, CharTokenizer(), len(tokens) - 1) == [tokens[:9], tokens[9:]]


def test_padding_is_masked():
    tokens, mask = chunking.pad([[5, 6, 7], [8], []], 4)
    np.testing.assert_array_equal(tokens, [[5, 6, 7, 0], [8, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(1), [3, 1, 0])
    assert tokens.dtype == np.int32


# ------------------------------------------------------------------------------------ configs

GEMMA_2_2B = DecoderConfig(
    vocab_size=256000,
    num_layers=26,
    width=2304,
    mlp_width=9216,
    num_heads=8,
    num_kv_heads=4,
    head_dim=256,
    rope=Rope(10000.0),
    norm_eps=1e-6,
    max_length=8192,
    tie_embeddings=True,
)


@pytest.mark.parametrize('variant', ['smollm2', 'gemma2_2b', 'mistral_7b', 'qwen3_4b', 'tiny'])
def test_configs_are_complete(variant):
    config = d2l_niah.get_config(variant)
    stages = config.data.stages
    assert sum(stage['steps'] for stage in stages) == config.optimizer.steps
    assert config.optimizer.warmup_steps < config.optimizer.steps
    assert config.objective.name in OBJECTIVES
    make_optimizer(config.optimizer)
    shape = config.hypernetwork.shape
    assert shape.scaling == pytest.approx(2 * shape.rank**1.5)
    assert shape.num_heads % shape.num_kv_heads == 0
    for stage in stages:
        # The needle of the base model's tokens, and documents, fit into a chunk.
        assert stage['tokens'][1] <= stage['chunk_length']
        assert set(stage['haystacks']) <= set(haystacks.HAYSTACKS)
        assert len(stage['chunks']) <= config.objective.max_chunks
    with pytest.raises(UserError, match='unknown variant'):
        d2l_niah.get_config(variant + 'x')


@pytest.mark.parametrize(
    'variant, early_exit', [('gemma2_2b', 6), ('mistral_7b', 8), ('qwen3_4b', 9)]
)
def test_published_settings(variant, early_exit):
    config = d2l_niah.get_config(variant)
    [stage] = config.data.stages
    rows = config.mesh.data * config.mesh.fsdp * config.groups * config.accumulate
    assert rows * stage['contexts'] * stage['steps'] == 640_000
    assert stage['tokens'] == (32, 256) and stage['question'] == niah.QUESTION
    assert config.hypernetwork.encoder.num_layers == early_exit
    assert config.hypernetwork.shape.rank == 8
    assert config.hypernetwork.modules == ('down_proj',)


def generated(config, base):
    """Shapes of parameters and LoRAs, without computing either."""
    hyper = hypernetwork.build(config.hypernetwork, BaseModel('', base, {}, None, ''))

    def run(key):
        # early_exit's features have one entry
        features = jax.numpy.zeros((1, 1, 8, base.width))
        params = hyper.module.init(key, features, hyper.example['mask'])['params']
        return params, hyper.module.apply({'params': params}, features, hyper.example['mask'])

    params, (chunks, shared) = jax.eval_shape(run, jax.random.key(0))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params)), chunks, shared


def test_published_hypernetwork_has_its_shape():
    count, chunks, shared = generated(d2l_niah.get_config('gemma2_2b'), GEMMA_2_2B)
    assert count > 200e6
    [(name, pair)] = chunks.pairs.items()
    assert name == 'down_proj'
    assert pair.a.shape == (26, 1, 8, 9216) and pair.b.shape == (26, 1, 8, 2304)
    assert shared.pairs[name].a.shape == pair.a.shape


@pytest.mark.parametrize('variant', ['smollm2', 'tiny'])
def test_small_variants_build(variant):
    base = dataclasses.replace(tiny_base().config, num_layers=8)
    count, chunks, _ = generated(d2l_niah.get_config(variant), base)
    assert chunks.pairs['down_proj'].a.shape == (8, 1, 8, base.mlp_width)
    assert 0 < count < 20e6
