"""Doc-to-LoRA on needle in a haystack (arXiv 2602.15902, section 4).

    python -m launch.train --config=configs/d2l_niah.py:smollm2 --workdir=DIR

Variants: `smollm2` (two CPU cores), `gemma2_2b`, `mistral_7b`, `qwen3_4b` (the published settings,
each for the TPUs that it names; for other devices set config.mesh, groups and accumulate), `tiny`
(seconds; for tests).
"""

from ml_collections import ConfigDict

from d2l.niah import QUESTION
from hyperlora.errors import UserError

GRASS = {'grass': 1.0}
PROSE = {'varied': 2.0, 'python_manual': 1.0, 'data_set_descriptions': 1.0, 'grass': 0.5}


def get_config(variant: str = 'smollm2') -> ConfigDict:
    """The config of a variant.

    Raises:
      UserError: no such variant.
    """
    variants = {
        'smollm2': _smollm2,
        'tiny': _tiny,
        'gemma2_2b': lambda: published('gemma2_2b', 'v5e:2x2', {'fsdp': 4}, 6, 4),
        'mistral_7b': lambda: published('mistral_7b', 'v5p:4x4x4', {'fsdp': 16, 'tensor': 4}, 8),
        'qwen3_4b': lambda: published('qwen3_4b', 'v5e:2x4', {'fsdp': 8}, 9, 2),
    }
    if variant not in variants:
        raise UserError(f'unknown variant {variant!r} of d2l_niah; known: {", ".join(variants)}')
    return variants[variant]()


def published(
    base: str, topology: str, mesh: dict[str, int], early_exit: int = 0, accumulate: int = 1
) -> ConfigDict:
    """The settings of the paper: 640,000 contexts of 32 to 256 tokens, once.

    Args:
      topology, mesh: the TPUs that it is made for.
      early_exit: layers of the encoder that read a context.
      accumulate: so that there are 128 contexts in a step.
    """
    contexts = 8  # of a packed row: 8 chunks each of rank 8 make a rank of 512
    steps = 640_000 // 128
    return ConfigDict(
        {
            'name': 'd2l_niah',
            'base': base,
            'base_dtype': 'bfloat16',
            'base_quantization': 'none',  # or a key of `quantization.KINDS`
            'seed': 0,
            'topology': topology,  # that `launch.aot` compiles for
            'mesh': {'slice': 1, 'data': 1, 'fsdp': 1, 'tensor': 1, **mesh},
            'remat': 'full',
            'neftune': 0.0,
            'init_from': '',  # weights to start from: a name, an export or a workdir
            'groups': 1,  # packed rows per data shard
            'accumulate': accumulate,
            'log_every': 10,
            'checkpoint_every': 500,
            'keep_checkpoints': 2,
            'hypernetwork': {
                'name': 'doc_to_lora',
                'dtype': 'bfloat16',  # that it computes in
                # `model`: the name of another model that reads the documents.
                'encoder': {
                    'name': 'early_exit',
                    'num_layers': early_exit,
                    'model': '',
                    'dtype': 'bfloat16',
                    'quantization': 'none',
                },
                'modules': ('down_proj',),
                'shape': {
                    'rank': 8,
                    'scaling': 2 * 8**1.5,
                    'latent_size': 512,
                    'num_latents': 208,
                    'num_blocks': 8,
                    'num_heads': 16,
                    'num_kv_heads': 4,
                    'head_dim': 128,
                    'num_pre_head_layers': 1,
                    'per_layer_processing': True,
                    'gate': False,
                    'scaler_b': 0.0,
                    'remat': 'full',
                },
            },
            'objective': {'name': 'cross_entropy', 'l1': 1.5, 'max_chunks': 8},
            'optimizer': {
                'learning_rate': 4e-5,
                'end_learning_rate': 1e-7,
                'warmup_steps': 100,
                'steps': steps,
                'weight_decay': 0.01,
                'b1': 0.9,
                'b2': 0.999,
                'clip_norm': 1.0,
            },
            'data': {
                'name': 'niah',
                'stages': [
                    {
                        'steps': steps,
                        'contexts': contexts,
                        'tokens': (32, 256),
                        'chunk_length': 256,
                        'chunks': (0.5, 0.125, *[0.0625] * 6),
                        'own_weight': 1.0,
                        'pool': 0,
                        'max_repeats': 1,
                        'question': QUESTION,
                        'haystacks': GRASS,
                    }
                ],
            },
            # How `launch.adapt` and the evaluation cut documents.
            'chunk_length': 1024,
            # Tokens around every chunk, as a chat template would put them.
            'chunk_prefix': (),
            'chunk_suffix': (),
            # Gates below it are shut then; see `DocToLora`.
            'min_gate': 0.0,
        }
    )


def _smollm2() -> ConfigDict:
    """Differs from the published settings in size, in the gate, and in a curriculum: first the
    bare needle, then haystacks, then needle-free chunks that count many times over."""
    config = published('smollm2', 'v5e:2x2', {'fsdp': -1}, 7)
    config.base_dtype = config.hypernetwork.dtype = 'float32'
    config.remat = config.hypernetwork.shape.remat = 'none'
    config.hypernetwork.shape.update(
        {
            'latent_size': 192,
            'num_latents': 64,
            'num_blocks': 4,
            'num_heads': 8,
            'num_kv_heads': 4,
            'head_dim': 32,
            'per_layer_processing': False,
            'gate': True,
            'scaler_b': 0.05,
        }
    )
    config.objective.l1 = 0.0
    stage = {
        'contexts': 10,
        'chunks': (1.0,),
        'own_weight': 1.0,
        'question': QUESTION,
        'haystacks': PROSE,
    }
    # Without the question a step costs half as much.
    bare = {
        **stage,
        'tokens': (0, 0),
        'chunk_length': 16,
        'pool': 0,
        'max_repeats': 1,
        'question': '',
    }
    short = {**stage, 'tokens': (0, 60), 'chunk_length': 64, 'pool': 2, 'max_repeats': 2}
    long = {**stage, 'tokens': (0, 124), 'chunk_length': 128, 'pool': 3, 'max_repeats': 8}
    config.data.stages = [
        {**bare, 'steps': 30, 'own_weight': 0.0},
        {**bare, 'steps': 370},
        {**short, 'steps': 200},
        {**long, 'steps': 200},
        {**long, 'steps': 1000, 'contexts': 20, 'tokens': (30, 124), 'pool': 4, 'max_repeats': 64},
    ]
    config.chunk_length = 128
    config.min_gate = 0.25
    config.optimizer.update(
        {
            'learning_rate': 4e-4,
            'end_learning_rate': 4e-6,
            'warmup_steps': 10,
            'b2': 0.98,
            'steps': sum(s['steps'] for s in config.data.stages),
        }
    )
    config.checkpoint_every = 50
    return config


def _tiny() -> ConfigDict:
    """A few steps of a small hypernetwork on the real base model."""
    config = _smollm2()
    config.hypernetwork.encoder.num_layers = 1
    config.hypernetwork.shape.update(
        {
            'latent_size': 16,
            'num_latents': 4,
            'num_blocks': 1,
            'num_heads': 2,
            'num_kv_heads': 1,
            'head_dim': 8,
        }
    )
    stage = {
        'contexts': 2,
        'chunks': (0.5, 0.5),
        'max_repeats': 2,
        'own_weight': 1.0,
        'question': QUESTION,
        'haystacks': GRASS,
    }
    config.data.stages = [
        {**stage, 'steps': 3, 'tokens': (0, 0), 'chunk_length': 24, 'pool': 0, 'chunks': (1.0,)},
        {**stage, 'steps': 3, 'tokens': (16, 60), 'chunk_length': 64, 'pool': 1},
    ]
    config.optimizer.update({'steps': 6, 'warmup_steps': 1})
    config.log_every = 1
    config.checkpoint_every = 2
    return config
