"""Measures speed and memory on this machine, all in one process.

    python -m launch.benchmark --workdir=DIR

Writes benchmark.json. Speeds are given as fractions of this machine's f32 matrix-multiply peak,
or as seconds x peak (GFLOP), so that runs on different machines can be compared.
"""

import resource
import sys
import time

from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for benchmark.json.', required=True)
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2-niah', 'Shipped weights or a folder.')
_TASK_CHECKPOINT = flags.DEFINE_string(
    'task_checkpoint', 'smollm2-t2l', 'Shipped weights or a folder.'
)
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs; the median counts.', lower_bound=1)


def measure(function, *args) -> dict:
    """Times a call, compiled by a first one, beside a 2048 x 2048 f32 matrix product.

    The two take turns, since a machine's speed drifts: medians of both are of the same minutes. Of
    the products of a turn the fastest counts; the first finds its data out of the caches.

    Returns:
      `seconds` of the call, and `peak_gflops`, the GFLOP/s of the matrix product.
    """
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.float32)

    def seconds(function, *args):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        return time.perf_counter() - start

    product = jax.jit(lambda x: x @ x)
    seconds(function, *args)
    turns = [
        (min(seconds(product, x) for _ in range(5)), seconds(function, *args))
        for _ in range(_REPEATS.value)
    ]
    peak, own = (sorted(column)[len(column) // 2] for column in zip(*turns, strict=True))
    return {'seconds': own, 'peak_gflops': 2 * 2048**3 / peak / 1e9}


def train_step(config, base, batch) -> dict:
    """The loss and its gradient on one microbatch: seconds, matrix GFLOP, and the bytes of all
    arguments, results and intermediate values."""
    import flax.linen as nn
    import jax

    from hyperlora import meta_learning
    from hyperlora.costs import matmul_flops

    learner = meta_learning.make_learner(config, base, 1)
    params = jax.jit(lambda f: nn.unbox(learner.hypernetwork.init(jax.random.key(0), f)))(
        base.params
    )

    def gradient(params, frozen, batch):
        both = {'base': frozen, 'encoder': frozen}
        return jax.grad(learner.loss, has_aux=True)(params, both, batch)

    args = params, base.params, batch
    compiled = jax.jit(gradient).lower(*args).compile()
    memory = compiled.memory_analysis()
    return {
        **measure(compiled, *args),
        'gflop': matmul_flops(gradient, *args) / 1e9,
        'memory_bytes': (
            memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        ),
    }


def packing(model, rows: int) -> dict:
    """The loss of short examples and its gradient: packed into rows, and a padded row for each.

    Both hold the same examples, so that the ratio of seconds is that of seconds per token.

    Args:
      model: a trained Text-to-LoRA; rows are as long as in its training.
      rows: packed ones.
    """
    import jax
    import numpy as np

    from hyperlora.costs import matmul_flops
    from hyperlora.data.packing import pack
    from hyperlora.meta_learning import make_learner
    from t2l.data import tokenize
    from t2l.tasks import Example

    config, base = model.config, model.base
    length, labels = config.data.row_tokens, config.data.row_labels
    sums = [Example(f'{n} + {n + 1}', str(2 * n + 1)) for n in range(99)]
    examples = [tokenize(example, base.tokenizer) for example in sums]
    packed, used = [], 0
    for _ in range(rows):
        packed.append(pack(examples[used:], length, labels))
        used += int(packed[-1]['segments'].max())
    padded = [pack([example], length, labels) for example in examples[:used]]
    embedding = model.hypernetwork.encoder(['Add the two numbers.'])
    learner = make_learner(config, base, 1)
    gradient = jax.grad(learner.loss, has_aux=True)

    def run(queries):
        query = jax.tree.map(lambda *x: np.concatenate(x), *queries)
        batch = {'context': {'embedding': embedding}, 'query': query}
        args = model.params, {'base': base.params}, batch
        return {
            **measure(jax.jit(gradient), *args),
            'gflop': matmul_flops(gradient, *args) / 1e9,
            'rows': len(queries),
            'share_of_tokens': float((query['segments'] > 0).mean()),
        }

    one, other = run(packed), run(padded)
    return {
        'examples': used,
        'packed': one,
        'padded': other,
        **{f'{key}_ratio': other[key] / one[key] for key in ('seconds', 'gflop')},
    }


def internalise(config, base, tokens: int) -> dict:
    """From one chunk of `tokens` tokens to its LoRA, fresh weights: seconds and matrix GFLOP."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from hyperlora import hypernetwork
    from hyperlora.costs import matmul_flops

    built = hypernetwork.build(config.hypernetwork, base)
    params = jax.jit(lambda f: nn.unbox(built.init(jax.random.key(0), f)))(base.params)
    context = {'tokens': jnp.ones((1, tokens), jnp.int32), 'mask': jnp.ones((1, tokens), bool)}
    args = params, base.params, context
    return {
        **measure(jax.jit(built.generate), *args),
        'gflop': matmul_flops(built.generate, *args) / 1e9,
    }


def main(_):
    workdir = cli.writable_directory(_WORKDIR.value)
    import jax
    import jax.numpy as jnp
    import numpy as np

    from configs import d2l_niah
    from d2l import haystacks, niah
    from d2l.internalize import Internalizer
    from hyperlora import data, trained
    from hyperlora.evaluation import record
    from t2l.specialize import Specializer

    model = trained.load(_CHECKPOINT.value)
    # Not the checkpoint's config, which may be older than the training step.
    base, config = model.base, d2l_niah.get_config('smollm2')
    results = {'devices': [str(d) for d in jax.devices()], 'jax': jax.__version__}

    def report(name, value):
        results[name] = value
        print(f'{name}: {value}', flush=True)

    def against_original(measured, original):
        return {
            **measured,
            'seconds_x_peak_gflop': measured['seconds'] * measured['peak_gflops'],
            'original_seconds_x_peak_gflop': original,
        }

    last_stage = sum(stage['steps'] for stage in config.data.stages[:-1])
    batch = jax.tree.map(
        lambda x: jnp.asarray(x[0]), data.build(config.data, base, base, 0, 1, 1)[last_stage]
    )
    measured = train_step(config, base, batch)
    report(
        'train_step',
        {
            **measured,
            'fraction_of_peak': measured['gflop'] / measured['seconds'] / measured['peak_gflops'],
            'context_tokens': int(batch['context']['tokens'].size),
            'query_tokens': int(batch['query']['tokens'].size),
        },
    )

    rng, writer = np.random.default_rng(0), niah.Writer(model.hypernetwork.encoder.tokenizer)
    document = writer.write(rng, haystacks.varied, 1024, niah.NEEDLE.format(1234)).tokens
    internalizer = Internalizer(model)
    report(
        'internalise_1024_tokens',
        {'tokens': len(document), **measure(lambda: internalizer(document).pairs)},
    )

    c, tokens = base.config, 131_072
    document = writer.write(rng, haystacks.grass, tokens, niah.NEEDLE.format(1234)).tokens
    lora = internalizer(document)
    report(
        'document_of_131072_tokens',
        {
            'tokens': len(document),
            'chunks': len(internalizer.split(document)),
            'lora_rank': lora.rank,
            'lora_bytes': lora.nbytes,
            # If every chunk said something, the LoRA would be folded into its delta.
            'most_lora_bytes': c.num_layers * c.width * (c.mlp_width + c.width) * 4,
            'kv_cache_bytes': base.cache_nbytes(len(document)),
        },
    )

    published = d2l_niah.get_config('smollm2')
    published.hypernetwork = d2l_niah.get_config('gemma2_2b').hypernetwork
    published.hypernetwork.encoder.num_layers = config.hypernetwork.encoder.num_layers
    published.hypernetwork.dtype = 'float32'
    published.hypernetwork.shape.remat = 'none'
    published.remat = 'dots'
    report(
        'published_shape_internalise_512_tokens',
        against_original(internalise(published, base, 512), 146),
    )
    ones = {
        'context': {'tokens': jnp.ones((4, 200), jnp.int32), 'mask': jnp.ones((4, 200), bool)},
        'query': {
            'tokens': jnp.ones((4, 32), jnp.int32),
            'labels': jnp.ones((4, 8), jnp.int32),
            'label_positions': jnp.tile(jnp.arange(23, 31), (4, 1)),
            'label_weights': jnp.ones((4, 8)),
            'chunk_weights': jnp.eye(4),
        },
    }
    report('published_shape_train_step', against_original(train_step(published, base, ones), 1216))
    specializer = Specializer(trained.load(_TASK_CHECKPOINT.value, base))
    report('packing', packing(specializer.trained, rows=4))
    for count in (1, 64):
        texts = [f'Repeat the word, followed by the number {n}.' for n in range(count)]
        embeddings = specializer.trained.hypernetwork.encoder(texts)
        report(
            f'loras_of_{count}_descriptions',
            {
                'from_text': measure(lambda texts=texts: specializer(texts).pairs),
                'from_embeddings': measure(
                    lambda x=embeddings: specializer.from_embeddings(x).pairs
                ),
            },
        )
    unit = 1 if sys.platform == 'darwin' else 1024
    report('peak_memory_bytes', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
    record.write(workdir / 'benchmark.json', results)


if __name__ == '__main__':
    cli.run(main)
