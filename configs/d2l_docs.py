"""Doc-to-LoRA on documents (arXiv 2602.15902, section 5), the main experiment, in its two stages.

    python -m launch.generate_data --config=configs/documents.py:READER,PATH --output=RECORDS
    python -m launch.train --config=configs/d2l_docs.py:VARIANT,RECORDS --workdir=DIR
    python -m launch.train --config=configs/d2l_docs.py:VARIANT_chunks,RECORDS,DIR --workdir=DIR2

RECORDS is what `launch.generate_data` wrote with the same base model (several folders with `+`
between); DIR what training starts from, such as the first stage's workdir. Variants: `gemma2_2b`,
`mistral_7b`, `qwen3_4b` (the published settings, each for the TPUs that it names; for others set
config.topology, mesh, groups and accumulate), `tiny` (SmolLM2 and seconds; for tests). On two CPU
cores another hypernetwork, see `d2l.associative`: `facts` (short documents), then `smollm2`.
"""

import functools

from ml_collections import ConfigDict

from configs import d2l_niah, fields
from hyperlora.errors import UserError


def get_config(argument: str = '') -> ConfigDict:
    """The config of a variant, of a folder of records, and of where the second stage starts.

    Raises:
      UserError: no such variant, no records, or a second stage without the first.
    """
    variant, records, start = fields(argument)
    name = variant.removesuffix('_chunks')
    published = functools.partial(_published, name)
    variants = {
        'facts': _facts,
        'smollm2': _smollm2,
        'tiny': _tiny,
        'gemma2_2b': lambda: published('v5e:8x8', {'fsdp': 64}),
        'mistral_7b': lambda: published('v5p:4x4x4', {'fsdp': 64}),
        'qwen3_4b': lambda: published('v5e:8x8', {'fsdp': 64}),
    }
    if name not in variants:
        raise UserError(f'unknown variant {variant!r} of d2l_docs; known: {", ".join(variants)}')
    if not records:
        raise UserError('name the records: configs/d2l_docs.py:VARIANT,RECORDS')
    config = variants[name]()
    config.data.records = records
    config.init_from = start
    if name != variant:
        if not start:
            raise UserError(
                "name the first stage's workdir: configs/d2l_docs.py:VARIANT_chunks,RECORDS,DIR"
            )
        _in_chunks(config)
    return config


def _published(base: str, topology: str, mesh: dict[str, int]) -> ConfigDict:
    """The first stage: 80,000 steps of 64 packed rows, each of 4,096 tokens of documents. What it
    shares with needles is said there.

    Args:
      topology, mesh: the TPUs that it is made for.
    """
    config = d2l_niah.published(base, topology, mesh)
    config.name = 'd2l_docs'
    config.hypernetwork.encoder.name = 'per_layer_activations'
    config.hypernetwork.shape.update({'num_latents': 8, 'num_blocks': 9})
    config.objective = ConfigDict(
        {'name': 'top_k_distillation', 'l1': 0.1, 'max_chunks': 1, 'label_block': 16}
    )
    config.data = ConfigDict(
        {
            'name': 'documents',
            'records': '',
            'steps': config.optimizer.get_ref('steps'),
            'teacher': 'stored',  # or 'online': asked in the training step
            'group_tokens': 4096,
            'context_tokens': (256, 512, 1024, 2048),
            'chunks': (1.0,),
            'together': 0.0,
            'queries': 1,
            'query_tokens': 256,
            'answer_tokens': 128,
            'teacher_tokens': 2304,
        }
    )
    config.optimizer.steps = 80_000
    return config


def _in_chunks(config: ConfigDict) -> None:
    """The second stage: 20,000 steps on documents in 1 to 8 chunks."""
    steps = config.optimizer.steps // 4
    config.optimizer.update({'steps': steps, 'warmup_steps': steps // 10})
    config.optimizer.learning_rate /= 2
    config.data.chunks = (0.5, 0.125, *[0.0625] * 6)
    config.data.group_tokens //= 2
    config.accumulate *= 2
    config.objective.max_chunks = 8
    config.chunk_length = 512


def _smollm2() -> ConfigDict:
    """A linear associative memory: the published hypernetwork learns to read from far more text
    than two cores get through. In half of the groups up to four documents are in the model."""
    config = d2l_niah.get_config('smollm2')
    config.name = 'd2l_docs'
    config.base_quantization = 'bfloat16'
    config.hypernetwork = ConfigDict(
        {
            'name': 'associative_memory',
            'shape': {
                'written': 15,
                'scaling': 1.0,
                'latent_size': 256,
                'num_blocks': 2,
                'num_heads': 8,
                'bottleneck': 128,
                'shared_rank': 64,
            },
        }
    )
    config.objective = ConfigDict({'name': 'top_k_distillation', 'l1': 0.0, 'max_chunks': 1})
    config.data = ConfigDict(
        {
            'name': 'documents',
            'records': '',
            'steps': config.optimizer.get_ref('steps'),
            'teacher': 'stored',
            'group_tokens': 512,
            'context_tokens': (128, 192, 256, 384),
            'chunks': (1.0,),
            'together': 0.5,
            'queries': 4,
            'query_tokens': 128,
            'answer_tokens': 32,
            'teacher_tokens': 1280,
        }
    )
    config.groups = 4
    config.optimizer.update({'learning_rate': 7e-4, 'end_learning_rate': 1e-5, 'steps': 280})
    config.chunk_length = 512
    config.min_gate = 0.0
    return config


def _facts() -> ConfigDict:
    """The same on short documents, from which it learns to read before it reads prose."""
    config = _smollm2()
    config.data.update(
        {
            'group_tokens': 1,  # a document each
            'context_tokens': (32, 64, 128),
            'together': 0.0,
            'queries': 3,
            'query_tokens': 64,
            'answer_tokens': 24,
        }
    )
    config.groups = 16
    config.optimizer.update({'learning_rate': 1e-3, 'end_learning_rate': 5e-4, 'steps': 150})
    return config


def _tiny() -> ConfigDict:
    """A few steps of a small hypernetwork on the real base model."""
    config = _published('smollm2', 'v5e:2x2', {'fsdp': -1})
    config.base_dtype = config.hypernetwork.dtype = 'float32'
    config.remat = config.hypernetwork.shape.remat = 'none'
    config.hypernetwork.shape.update(
        {
            'latent_size': 16,
            'num_latents': 4,
            'num_blocks': 1,
            'num_heads': 2,
            'num_kv_heads': 1,
            'head_dim': 8,
            'per_layer_processing': False,
        }
    )
    config.data.update(
        {
            'group_tokens': 256,
            'context_tokens': (128, 256),
            'query_tokens': 64,
            'answer_tokens': 32,
            'teacher_tokens': 384,
        }
    )
    config.optimizer.update({'steps': 8, 'warmup_steps': 1})
    config.log_every = 1
    config.checkpoint_every = 2
    return config
