"""Converts a checkpoint of the original Doc-to-LoRA or Text-to-LoRA, without running its pickle.

    python -m launch.convert --source=pytorch_model.bin --base=DIR --output=DIR [--encoder=DIR]
    python -m launch.convert --source=DIR_OF_hypermod.pt --base=DIR --output=DIR [--embedder=DIR]

The output can then be given to any command as --checkpoint. PyTorch is not needed.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from launch import cli

_SOURCE = flags.DEFINE_string(
    'source', None, 'pytorch_model.bin, hypermod.pt, or the folder of either.', required=True
)
_BASE = flags.DEFINE_string('base', None, 'The base model that it is for.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
_ENCODER = flags.DEFINE_string('encoder', '', 'Model that reads the documents, if not the base.')
_EMBEDDER = flags.DEFINE_string('embedder', '', 'Model that embeds descriptions, if not the base.')
_DTYPE = flags.DEFINE_enum(
    'dtype', 'bfloat16', ['bfloat16', 'float32'], 'In which the frozen models will be run.'
)


class StateDict(dict):
    """Tensors by name; remembers which have not been read."""

    def __init__(self, tensors):
        # torch.compile puts a prefix before every name.
        super().__init__({k.removeprefix('_orig_mod.'): v for k, v in tensors.items()})
        self.unread = set(self)

    def __getitem__(self, name):
        self.unread.discard(name)
        return super().__getitem__(name)


@dataclasses.dataclass
class Converted:
    """A checkpoint in our terms: its part of the config, the module, f32 parameters, an example of
    what the module reads, and the fingerprint of its encoder (None: the base model)."""

    config: dict[str, Any]
    module: Any
    params: dict
    example: tuple
    encoder_fingerprint: str | None


def doc_to_lora(checkpoint: dict, state: StateDict, base, encoder: str, dtype: str) -> Converted:
    """Converts a pytorch_model.bin of Doc-to-LoRA."""
    import jax.numpy as jnp
    from ml_collections import ConfigDict

    from d2l import build, upstream
    from d2l.context_encoders import text_config
    from hyperlora.models.base import load_params

    reader, _, fingerprint = load_params(encoder, images=True) if encoder else (None,) * 3
    config = upstream.config_from_upstream(checkpoint, base, reader and text_config(reader))
    config['hypernetwork']['encoder'] |= {
        'model': encoder,
        'dtype': dtype,
        'quantization': 'none',
    }
    module = build.make_module(ConfigDict(config['hypernetwork']), base, reader or base)
    entries = base.num_layers if module.config.layer_to_layer else 1
    return Converted(
        config,
        module,
        upstream.params_from_upstream(state, module.config),
        (jnp.zeros((1, entries, 8, module.config.feature_width)), jnp.ones((1, 8), bool)),
        fingerprint,
    )


def text_to_lora(path: pathlib.Path, state: StateDict, base, embedder: str) -> Converted:
    """Converts a hypermod.pt of Text-to-LoRA and the settings beside it, or, as training leaves
    them, three folders above it."""
    import jax.numpy as jnp
    import yaml
    from ml_collections import ConfigDict

    from hyperlora.errors import UserError
    from hyperlora.models.base import read_json
    from hyperlora.models.embedders import load_embedder
    from t2l import build, upstream

    places = (path.parent, path.resolve().parent.parent.parent)
    folder = next((p for p in places if (p / 'args.yaml').is_file()), None)
    if folder is None:
        raise UserError(f'{path}: there is no args.yaml beside it')
    try:
        args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f'{folder / "args.yaml"}: cannot read ({error})') from error
    peft = read_json(folder / 'adapter_config.json')
    config = upstream.config_from_upstream(args, peft, state, base, embedder)
    module = build.make_module(ConfigDict(config['hypernetwork']), base)
    return Converted(
        config,
        module,
        upstream.params_from_upstream(state, module.config),
        (jnp.zeros((1, module.config.embedding_width)),),
        load_embedder(embedder).fingerprint if embedder else None,
    )


def convert(
    source: str, base: str, encoder: str = '', embedder: str = '', dtype: str = 'bfloat16'
) -> tuple[dict, dict]:
    """Reads a checkpoint of the original.

    Args:
      source: its file or folder.
      base: name or folder of its base model.
      encoder: the same of the model that reads its documents, '' if that is the base model.
      embedder: the same of the model that embeds its descriptions.
      dtype: in which the frozen models will be run.

    Returns:
      (f32 parameters, record), as `checkpointing.export` takes them.

    Raises:
      UserError: the file holds anything but tensors and known settings, or they do not fit each
        other or the models given.
    """
    import flax.linen as nn
    import jax

    from hyperlora import torch_files
    from hyperlora.errors import UserError
    from hyperlora.models.base import load_params
    from hyperlora.trained import differences

    path = pathlib.Path(source)
    if path.is_dir():
        names = ('pytorch_model.bin', 'hypermod.pt')
        path = next((path / name for name in names if (path / name).is_file()), path)
    loaded = torch_files.load(path)
    base_config, _, base_fingerprint = load_params(base)
    try:
        state = StateDict({k: v for k, v in loaded.items() if hasattr(v, 'shape')})
        if 'hypernet_config' in loaded:
            done = doc_to_lora(loaded, state, base_config, encoder, dtype)
        else:
            done = text_to_lora(path, state, base_config, embedder)
        wanted = jax.eval_shape(done.module.init, jax.random.key(0), *done.example)['params']
    except (KeyError, AttributeError, TypeError, IndexError) as error:
        raise UserError(
            f'{path}: not a checkpoint of Doc-to-LoRA or Text-to-LoRA '
            f'({type(error).__name__}: {error})'
        ) from error
    wrong = differences(nn.unbox(wanted), done.params)
    wrong += [f'{name} is unknown' for name in sorted(state.unread)]
    if wrong:
        raise UserError(f'{path}: the tensors do not fit the settings: {", ".join(wrong)}')
    return done.params, {
        'config': {'base': base, 'base_dtype': dtype, 'base_quantization': 'none', **done.config},
        'base_fingerprint': base_fingerprint,
        'encoder_fingerprint': done.encoder_fingerprint or base_fingerprint,
    }


def main(_):
    from hyperlora import checkpointing

    params, record = convert(
        _SOURCE.value, _BASE.value, _ENCODER.value, _EMBEDDER.value, _DTYPE.value
    )
    checkpointing.export(_OUTPUT.value, params, record, dtype='float32')
    kind = record['config']['hypernetwork']['name']
    print(f'converted {_SOURCE.value} ({kind}) to {_OUTPUT.value}')


if __name__ == '__main__':
    cli.run(main)
