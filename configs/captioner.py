"""A small vision-language model: SmolLM2 names pictures that a vision tower shows it.

    python -m launch.train --config=configs/captioner.py:align,EMOJI --workdir=DIR1
    python -m launch.train --config=configs/captioner.py:smollm2,EMOJI,DIR1 --workdir=DIR2

EMOJI is a folder of the unpacked npm packages emoji-datasource-VENDOR and, if at hand,
@lobehub/fluent-emoji-3d and emojione-assets; the pictures of config.data.held_out are never trained
on. Beside them stand two thirds of scikit-learn's handwritten digits (`.[pictures]`).

`align` leads the soft tokens of a picture to the words of its name, as the frozen model unembeds
them; this takes no pass of the model, and is what d2l_images reads best. `smollm2` goes on through
the frozen model, which must say the name; soft tokens that it has no use for then drift, and
mislead a hypernetwork. `tiny,EMOJI`: a small tower, for tests.
"""

import pathlib

from ml_collections import ConfigDict

from configs import fields
from hyperlora.errors import UserError

# Of the stages: steps, pictures of a step, learning rate.
_STAGES = {'align': (800, 128, 1e-3), 'smollm2': (120, 16, 2e-4), 'tiny': (6, 4, 1e-3)}


def get_config(argument: str = '') -> ConfigDict:
    """The config of a variant, for a folder of packages, and of where a stage starts.

    Raises:
      UserError: no such variant, no folder, nothing in it, or a later stage without the first.
    """
    variant, folder, start = fields(argument)
    if variant not in _STAGES:
        raise UserError(f'unknown variant {variant!r} of captioner; known: {", ".join(_STAGES)}')
    if variant == 'smollm2' and not start:
        raise UserError('name the workdir of the stage before: smollm2,EMOJI,DIR')
    config = _config(variant, _sources(folder))
    config.init_from = start
    if variant == 'align':
        config.hypernetwork.mix = False
        config.objective = ConfigDict({'name': 'alignment', 'places': config.data.tokens_per_image})
    elif variant == 'tiny':
        config.hypernetwork.vision.update(
            {'patch_size': 4, 'num_layers': 1, 'width': 16, 'mlp_width': 32, 'num_heads': 2}
        )
        config.data.held_out = ()
        config.data.sources = [s for s in config.data.sources if s['reader'] == 'emoji']
        config.optimizer.warmup_steps = 1
        config.log_every, config.checkpoint_every = 1, 2
    return config


def _sources(folder: str) -> list[dict]:
    """The pictures in a folder of packages, and digits."""
    root = pathlib.Path(folder)
    packages = sorted({p.parents[2] for p in root.glob('*/img/*/64')})
    if not folder or not packages:
        raise UserError(
            f'name a folder of the unpacked packages emoji-datasource-VENDOR, not {folder!r}'
        )
    named = {'reader': 'code_points', 'names': str(packages[0])}
    return [
        *({'reader': 'emoji', 'path': str(path)} for path in packages),
        *(
            {**named, 'path': str(path), 'style': path.relative_to(root).parts[0]}
            for places in ('*/assets', '*/png/64')
            for path in sorted(root.glob(places))
        ),
        {'reader': 'digits'},
    ]


def _config(variant: str, sources: list[dict]) -> ConfigDict:
    steps, pictures, rate = _STAGES[variant]
    # Coarse pictures: what tells styles apart is in the details, and a patch for each soft token.
    size, tokens = 16, 4
    config = ConfigDict(
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
                'mix': True,
                'vision': {
                    'image_size': size,
                    'patch_size': 8,
                    'num_layers': 3,
                    'width': 384,
                    'mlp_width': 1536,
                    'num_heads': 6,
                },
            },
            'objective': {'name': 'cross_entropy'},
            'optimizer': {
                'learning_rate': rate,
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
                'sources': sources,
                'held_out': ('facebook',),
                'pictures': pictures,
                'image_size': size,
                'tokens_per_image': tokens,
                'query_tokens': 40,
                'answer_tokens': 7,
            },
        }
    )
    config.data.steps = config.optimizer.get_ref('steps')
    return config
