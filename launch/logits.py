"""Runs a model on given tokens, so that it can be checked against another implementation.

    python -m launch.logits --model=NAME_OR_DIR --input=FILE.npz --output=FILE.npz [--adapter=DIR]

The input holds `input_ids [b, s]` and optionally `attention_mask [b, s]`, padding on either side.
The output holds `logits [b, s, v]` and `hidden_states [l + 1, b, s, d]`, f32: the input of every
layer, then the final norm. Values at padding mean nothing.
"""

import pathlib
import zipfile
import zlib

from absl import flags

from hyperlora.errors import UserError
from launch import cli

_MODEL = flags.DEFINE_string('model', None, 'smollm2, a .gguf file or a folder.', required=True)
_INPUT = flags.DEFINE_string('input', None, '.npz file of tokens.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, '.npz file to write.', required=True)
_ADAPTER = flags.DEFINE_string('adapter', None, 'Folder of an adapter.')


def read_tokens(path: str):
    """(input_ids, attention_mask or None) of an .npz file.

    Raises:
      UserError: unreadable file, or arrays that are not `[b, s]` integers.
    """
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile, zlib.error, EOFError) as e:
        raise UserError(f'{path}: not a readable .npz file ({e})') from e
    if 'input_ids' not in arrays:
        raise UserError(f'{path}: holds no input_ids, only {", ".join(arrays) or "nothing"}')
    tokens, mask = arrays['input_ids'], arrays.get('attention_mask')
    if tokens.ndim != 2 or tokens.dtype.kind not in 'iu' or not tokens.size:
        raise UserError(
            f'{path}: input_ids must be integers [b, s], not {tokens.dtype} of shape {tokens.shape}'
        )
    if mask is not None and mask.shape != tokens.shape:
        raise UserError(f'{path}: attention_mask is {mask.shape}, input_ids are {tokens.shape}')
    return tokens, mask


def main(_):
    tokens, mask = read_tokens(_INPUT.value)
    output = pathlib.Path(_OUTPUT.value)
    output = cli.writable_directory(output.parent) / output.name
    import jax
    import numpy as np

    from hyperlora import adapters, lora
    from hyperlora.models.base import load_base
    from hyperlora.models.decoder import Decoder, first_layers

    base = load_base(_MODEL.value)
    if tokens.min() < 0 or tokens.max() >= base.config.vocab_size:
        raise UserError(
            f'{_INPUT.value}: tokens must be from 0 to {base.config.vocab_size - 1}, '
            f'found {tokens.min()} to {tokens.max()}'
        )
    tokens, params = tokens.astype(np.int32), base.params
    if _ADAPTER.value:
        params = lora.merge(params, adapters.load(_ADAPTER.value, base.config, base.fingerprint))
    segments = None if mask is None else (mask != 0).astype(np.int32)

    @jax.jit
    def run(params):
        layers = base.config.num_layers
        hidden, inputs = first_layers(base.config, params, tokens, layers, segments)
        logits = Decoder(base.config).apply({'params': params}, hidden, method='unembed')
        return logits, inputs, hidden

    logits, inputs, hidden = map(np.asarray, run(params))
    partial = output.with_name(output.name + '.partial')
    try:
        with partial.open('wb') as file:
            np.savez(file, logits=logits, hidden_states=np.concatenate([inputs, hidden[None]]))
        partial.replace(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f'{output}: cannot write ({error.strerror}): make room there') from error
    print(f'logits {logits.shape} of {base.name} in {output}')


if __name__ == '__main__':
    cli.run(main)
