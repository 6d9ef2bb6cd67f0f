"""Measures speed and memory on this machine, all in one process.

    python -m launch.benchmark --workdir=DIR

Writes benchmark.json. Speeds are given as fractions of this machine's f32 matrix-multiply peak,
or as seconds x peak (GFLOP), so that runs on different machines can be compared.
"""

import json
import resource
import time

from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder for benchmark.json.', required=True)
_CHECKPOINT = flags.DEFINE_string('checkpoint', 'smollm2-niah', 'Shipped weights or a folder.')
_REPEATS = flags.DEFINE_integer('repeats', 5, 'Timed runs; the median counts.')


def seconds(function, *args) -> float:
    """Median wall-clock seconds of a call after a first one that compiles."""
    import jax
    jax.block_until_ready(function(*args))
    times = []
    for _ in range(_REPEATS.value):
        start = time.perf_counter()
        jax.block_until_ready(function(*args))
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def matmul_flops(function, *args) -> float:
    """Floating-point operations of all matrix products of a function, loops counted in full."""
    import jax
    from jax.extend.core import ClosedJaxpr, Jaxpr

    def product(sizes):
        total = 1
        for size in sizes:
            total *= size
        return total

    def inner(value):
        if isinstance(value, ClosedJaxpr):
            return [value.jaxpr]
        if isinstance(value, Jaxpr):
            return [value]
        return [j for v in value for j in inner(v)] if isinstance(value, tuple | list) else []

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == 'dot_general':
                (contracted, _), _ = equation.params['dimension_numbers']
                left = equation.invars[0].aval.shape
                total += (2 * product(equation.outvars[0].aval.shape)
                          * product(left[i] for i in contracted))
            times = equation.params.get('length', 1) if equation.primitive.name == 'scan' else 1
            total += times * sum(count(j) for v in equation.params.values() for j in inner(v))
        return total
    return count(jax.make_jaxpr(function)(*args).jaxpr)


def matmul_peak() -> float:
    """FLOP/s of a 2048 x 2048 f32 matrix product."""
    import jax
    import jax.numpy as jnp
    x = jax.random.normal(jax.random.key(0), (2048, 2048), jnp.float32)
    return 2 * 2048**3 / seconds(jax.jit(lambda x: x @ x), x)


def train_step(config, base, batch) -> tuple[float, float]:
    """Seconds and matrix FLOPs of the loss and its gradient on one microbatch."""
    import flax.linen as nn
    import jax

    from hyperlora import meta_learning
    learner = meta_learning.make_learner(config, base, 1)
    params = jax.jit(lambda f: nn.unbox(learner.hypernetwork.init(jax.random.key(0), f)))(
        base.params)
    gradient = jax.grad(learner.loss, has_aux=True)
    return (seconds(jax.jit(gradient), params, base.params, batch),
            matmul_flops(gradient, params, base.params, batch))


def internalise(config, base, tokens: int) -> tuple[float, float]:
    """Seconds and matrix FLOPs from `tokens` context tokens to the LoRA, fresh weights."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    from hyperlora import hypernetwork
    built = hypernetwork.build(config.hypernetwork, base.config)
    params = jax.jit(lambda f: nn.unbox(built.init(jax.random.key(0), f)))(base.params)
    context = {'tokens': jnp.ones((1, tokens), jnp.int32), 'mask': jnp.ones((1, tokens), bool)}
    return (seconds(jax.jit(built.generate), params, base.params, context),
            matmul_flops(built.generate, params, base.params, context))


def main(_):
    workdir = cli.writable_directory(_WORKDIR.value)
    import jax
    import jax.numpy as jnp

    from configs import d2l_niah
    from d2l.internalize import Internalizer
    from hyperlora import data, trained
    from hyperlora import lora as lora_lib

    model = trained.load(_CHECKPOINT.value)
    base, config = model.base, model.config
    results = {'devices': [str(d) for d in jax.devices()], 'jax': jax.__version__}

    def report(name, value):
        results[name] = value
        print(f'{name}: {value}', flush=True)

    peak = matmul_peak()
    report('matmul_peak_gflops', peak / 1e9)

    # The last stage but one: documents of up to 256 tokens, the full question.
    step = sum(stage['steps'] for stage in config.data.stages[:-2])
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]),
                         data.build(config.data, base.tokenizer, 0, 1, 1)[step])
    elapsed, flops = train_step(config, base, batch)
    report('train_step', {
        'seconds': elapsed, 'gflop': flops / 1e9, 'fraction_of_peak': flops / elapsed / peak,
        'context_tokens': int(batch['context']['tokens'].size),
        'query_tokens': int(batch['query']['tokens'].size)})

    document = base.tokenizer.encode('Once upon a midnight dreary, ' * 400)[:1024]
    internalizer = Internalizer(model)
    elapsed = seconds(lambda: internalizer(document).pairs)
    report('internalise_1024_tokens_seconds', elapsed)

    c = base.config
    tokens = 131_072
    chunks = tokens // config.chunk_length
    dims = {m: (c.mlp_width, c.width) for m in config.hypernetwork.modules}
    shape = jax.eval_shape(lambda: lora_lib.compact(lora_lib.init(
        jax.random.key(0), dims, c.num_layers, (chunks + 1) * config.hypernetwork.shape.rank)))
    report('document_of_131072_tokens', {
        'chunks': chunks, 'lora_rank': shape.rank, 'lora_bytes': shape.nbytes,
        'kv_cache_bytes': 2 * c.num_layers * c.num_kv_heads * c.head_dim * tokens * 4})

    published = d2l_niah.get_config('smollm2')
    published.hypernetwork = d2l_niah.get_config('gemma2_2b').hypernetwork
    published.hypernetwork.encoder.num_layers = config.hypernetwork.encoder.num_layers
    elapsed, flops = internalise(published, base, 512)
    report('published_shape_internalise_512_tokens', {
        'seconds': elapsed, 'gflop': flops / 1e9, 'seconds_x_peak_gflop': elapsed * peak / 1e9,
        'original_seconds_x_peak_gflop': 146})
    ones = {
        'context': {'tokens': jnp.ones((4, 200), jnp.int32), 'mask': jnp.ones((4, 200), bool)},
        'query': {'tokens': jnp.ones((4, 32), jnp.int32), 'labels': jnp.ones((4, 8), jnp.int32),
                  'label_positions': jnp.tile(jnp.arange(23, 31), (4, 1)),
                  'label_weights': jnp.ones((4, 8)), 'chunk_weights': jnp.eye(4)}}
    elapsed, flops = train_step(published, base, ones)
    report('published_shape_train_step', {
        'seconds': elapsed, 'gflop': flops / 1e9, 'seconds_x_peak_gflop': elapsed * peak / 1e9,
        'original_seconds_x_peak_gflop': 1216})
    report('peak_memory_bytes', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    path = workdir / 'benchmark.json'
    path.with_suffix('.partial').write_text(json.dumps(results, indent=2) + '\n')
    path.with_suffix('.partial').rename(path)


if __name__ == '__main__':
    cli.run(main)
