"""What several tests share: reference arrays, base models, a small training.

The compilation cache makes repeated runs quick. It is set before jax is imported, in the
environment, so that the processes that tests start share it.
"""

import functools
import json
import os
import pathlib

os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR', str(pathlib.Path('~/.cache/hyperlora/jax-tests').expanduser())
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import d2l_niah
from hyperlora.models import families, weights
from hyperlora.models.base import BaseModel, load_base
from hyperlora.models.decoder import Decoder
from hyperlora.models.families import DecoderConfig, Rope

GOLDEN = pathlib.Path(__file__).parent / 'golden'
TINY = DecoderConfig(
    vocab_size=128,
    num_layers=3,
    width=32,
    mlp_width=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rope=Rope(10000.0),
    norm_eps=1e-5,
    max_length=256,
    tie_embeddings=True,
)


class CharTokenizer:
    """One token per ASCII character; an answer ends with token 3."""

    eos_id = 3
    answer_start = [2]

    def encode(self, text):
        return list(text.encode('ascii'))

    def decode(self, ids):
        return ''.join(chr(i) for i in ids if i > 3)

    def prompt(self, question):
        return [1, *self.encode(question), 2]

    @functools.cached_property
    def boundaries(self):
        texts = [chr(i) for i in range(TINY.vocab_size)]
        return (
            np.array([text in '.!?\n' for text in texts]),
            np.array([text.isspace() for text in texts]),
        )


@functools.cache
def tiny_base(seed=0):
    """A random base model; its embeddings are large enough that layers and context matter."""
    init = functools.partial(Decoder(TINY).init, method='init_all')
    params = nn.unbox(jax.jit(init)(jax.random.key(seed), jnp.zeros((1, 4), jnp.int32)))['params']
    params['embedder']['embedding'] *= 10
    return BaseModel('tiny', TINY, params, CharTokenizer(), weights.fingerprint(params))


def tiny_training():
    """Six steps of the smallest training, for `tiny_base`; a checkpoint at every second step."""
    config = d2l_niah.get_config('tiny')
    config.base = 'tiny'
    stages = [
        stage.to_dict() if hasattr(stage, 'to_dict') else dict(stage)
        for stage in config.data.stages
    ]
    config.data.stages = [
        {**stage, 'question': 'Number?', 'chunk_length': 40 * (i + 1)}
        for i, stage in enumerate(stages)
    ]
    return config


def read_golden(name):
    """Case of the reference -> (its description, its arrays)."""
    arrays = {}
    for part in sorted(GOLDEN.glob(f'{name}.*npz')):
        with np.load(part) as file:
            arrays |= file
    return json.loads((GOLDEN / f'{name}.json').read_text()), arrays


@pytest.fixture(scope='session')
def golden_llama():
    """Config and parameters of the base model of the Llama cases."""
    config = families.from_hf(json.loads((GOLDEN / 'd2l_base_llama/config.json').read_text()))
    with np.load(GOLDEN / 'd2l_base_llama_state.npz') as state:
        return config, weights.from_hf_state(dict(state), config, np.float32)


@pytest.fixture(scope='session')
def smollm2():
    return load_base('smollm2')


@pytest.fixture
def tiny():
    return tiny_base()
