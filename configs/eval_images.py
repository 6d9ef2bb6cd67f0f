"""Images through text-only weights, beside controls and upper bounds.

python -m launch.evaluate --config=configs/eval_images.py:emoji,EMOJI --checkpoint=NAME_OR_DIR \\
    --config.captioner=NAME_OR_DIR --workdir=DIR
... --config=configs/eval_images.py:digits
... --config=configs/eval_images.py:imagenette --config.captioner=   # the encoder reads images
"""

import pathlib

from ml_collections import ConfigDict

from hyperlora.errors import UserError

# Of the pictures that a vendor draws, ten kinds of things.
GROUPS = (
    'animal-mammal',
    'animal-bird',
    'animal-bug',
    'food-fruit',
    'food-prepared',
    'clothing',
    'transport-ground',
    'musical-instrument',
    'tool',
    'place-building',
)


def get_config(argument: str = 'digits') -> ConfigDict:
    """The config for `emoji,EMOJI` (a folder of the packages), `digits` or `imagenette`.

    Raises:
      UserError: none of these.
    """
    kind, _, folder = argument.partition(',')
    style, groups, limit = '', (), 0
    if kind == 'emoji' and folder:
        style, groups, limit = 'facebook', GROUPS, 25
        sources = ({'reader': 'emoji', 'path': str(pathlib.Path(folder) / style)},)
    elif argument == 'digits':
        sources, limit = ({'reader': 'digits', 'held_out': True},), 30
    elif argument == 'imagenette':
        sources = ({'reader': 'imagenette', 'split': 'validation'},)
    else:
        raise UserError(f'give emoji,EMOJI or digits or imagenette, not {argument!r}')
    return ConfigDict(
        {
            'name': 'eval_images',
            'captioner': '',
            'sources': sources,
            'style': style,
            # A name of each is offered for every picture; all that there are if empty.
            'groups': groups,
            'limit': limit,  # pictures of each group; 0 for all
            'seed': 0,
            'batch': 8,  # pictures
        }
    )
