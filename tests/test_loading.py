"""The memory and time of loading a model of real size; run with -m slow -s to see them.

Run as a program, this file is the process that is measured:

    python tests/test_loading.py DIR
"""

import json
import pathlib
import re
import subprocess
import sys
import threading
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from hyperlora.models import families, weights
from hyperlora.models.decoder import Decoder

GEMMA2_2B = {
    'model_type': 'gemma2',
    'hidden_size': 2304,
    'intermediate_size': 9216,
    'num_hidden_layers': 26,
    'num_attention_heads': 8,
    'num_key_value_heads': 4,
    'head_dim': 256,
    'query_pre_attn_scalar': 256,
    'vocab_size': 256000,
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')
def test_loading_takes_hardly_more_memory_than_the_model(tmp_path):
    """5.2 GB of bf16 in shards; the folder is removed again."""
    config = families.from_hf(GEMMA2_2B)
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    init = Decoder(config).init
    shapes = jax.eval_shape(lambda t: init(jax.random.key(0), t, method='init_all'), tokens)
    noise = (0.02 * np.random.default_rng(0).standard_normal(10_000)).astype(ml_dtypes.bfloat16)
    params = jax.tree.map(
        lambda x: np.broadcast_to(noise[: x.shape[-1]], x.shape), nn.unbox(shapes)['params']
    )
    try:
        weights.save_hf(tmp_path, params, config, GEMMA2_2B, shard_bytes=10**9)
        found = json.loads(subprocess.check_output([sys.executable, __file__, str(tmp_path)]))
    finally:
        for path in tmp_path.glob('*.safetensors'):
            path.unlink()
    print('\n' + ', '.join(f'{name} {value:.2f}' for name, value in found.items()))
    assert found['model GB'] > 5
    assert found['peak GB'] < 1.3 * found['model GB']


def own_gigabytes():
    """Memory of this process alone: mapped files do not count, the system can drop their pages."""
    status = pathlib.Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'RssAnon:\s+(\d+)', status)[1]) / 1e9


def measure(folder):
    config = families.from_hf(json.loads((pathlib.Path(folder) / 'config.json').read_text()))
    jax.devices()
    before, peak, done = own_gigabytes(), 0.0, threading.Event()

    def sample():
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own_gigabytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.perf_counter()
    params = jax.block_until_ready(weights.from_safetensors(folder, config, 'bfloat16'))
    seconds = time.perf_counter() - start
    done.set()
    sampler.join()
    size = sum(x.nbytes for x in jax.tree.leaves(params)) / 1e9
    found = {'model GB': size, 'peak GB': peak - before, 'after GB': own_gigabytes() - before}
    print(json.dumps(found | {'seconds': seconds}))


if __name__ == '__main__':
    measure(sys.argv[1])
