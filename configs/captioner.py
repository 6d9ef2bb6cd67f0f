"""A small vision-language model: SmolLM2 names pictures that a vision tower shows it.

    python -m launch.train --config=configs/captioner.py:EMOJI --workdir=DIR

EMOJI is a folder of the unpacked npm packages emoji-datasource-VENDOR; the pictures of
config.data.held_out are never trained on. With `,tiny` after it: a small tower, for tests.
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora.errors import UserError


def get_config(argument: str = '') -> ConfigDict:
    """The config for a folder of packages.

    Raises:
      UserError: no folder, nothing in it, or no such variant.
    """
    folder, _, variant = argument.partition(',')
    packages = sorted(p.parent for p in pathlib.Path(folder).expanduser().glob('*/emoji.json'))
    if not folder or not packages:
        raise UserError(
            f'name a folder of the unpacked packages emoji-datasource-VENDOR, not {folder!r}'
        )
    if variant not in ('', 'tiny'):
        raise UserError(f'unknown variant {variant!r} of captioner; known: tiny')
    config = _config([{'reader': 'emoji', 'path': str(path)} for path in packages])
    if variant:
        config.hypernetwork.vision.update(
            {'image_size': 16, 'patch_size': 4, 'num_layers': 1, 'width': 16, 'mlp_width': 32}
        )
        config.data.update({'steps': 6, 'pictures': 4, 'image_size': 16, 'held_out': ()})
        config.optimizer.update({'steps': 6, 'warmup_steps': 1})
        config.log_every, config.checkpoint_every = 1, 2
    return config


def _config(sources: list[dict]) -> ConfigDict:
    steps, size, tokens = 1500, 64, 4
    return ConfigDict(
        {
            'name': 'captioner',
            'base': 'smollm2',
            'base_dtype': 'float32',
            'base_quantization': 'none',
            'seed': 0,
            'mesh': {'slice': 1, 'data': 1, 'fsdp': -1, 'tensor': 1},
            'remat': 'none',
            'neftune': 0.0,
            'init_from': '',
            'groups': 1,
            'accumulate': 1,
            'log_every': 20,
            'checkpoint_every': 100,
            'keep_checkpoints': 2,
            'hypernetwork': {
                'name': 'captioner',
                'tokens_per_image': tokens,
                'vision': {
                    'image_size': size,
                    'patch_size': 8,
                    'num_layers': 6,
                    'width': 256,
                    'mlp_width': 1024,
                    'num_heads': 4,
                },
            },
            'objective': {'name': 'cross_entropy'},
            'optimizer': {
                'learning_rate': 5e-4,
                'end_learning_rate': 1e-6,
                'warmup_steps': 50,
                'steps': steps,
                'weight_decay': 0.05,
                'b1': 0.9,
                'b2': 0.98,
                'clip_norm': 1.0,
            },
            'data': {
                'name': 'captions',
                'steps': steps,
                'sources': sources,
                'held_out': ('facebook',),
                'pictures': 16,
                'image_size': size,
                'tokens_per_image': tokens,
                'query_tokens': 40,
                'answer_tokens': 7,
            },
        }
    )
