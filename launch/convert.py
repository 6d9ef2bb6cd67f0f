"""Converts a checkpoint of the original Doc-to-LoRA or Text-to-LoRA, without running its pickle.

    python -m launch.convert --source=pytorch_model.bin --base=DIR --output=DIR [--encoder=DIR]
    python -m launch.convert --source=DIR_OF_hypermod.pt --base=DIR --output=DIR [--embedder=DIR]

The output can then be given to any command as --checkpoint. PyTorch is not needed.
"""

from absl import flags

from launch import cli

_SOURCE = flags.DEFINE_string(
    'source', None, 'pytorch_model.bin, hypermod.pt, or the folder of either.', required=True
)
_BASE = flags.DEFINE_string('base', None, 'The base model that it is for.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
_ENCODER = flags.DEFINE_string('encoder', None, 'Model that reads the documents, if not the base.')
_EMBEDDER = flags.DEFINE_string('embedder', None, 'Model that embeds tasks, if not the base.')
_DTYPE = flags.DEFINE_enum(
    'dtype', 'bfloat16', ['bfloat16', 'float32'], 'In which the frozen models will be run.'
)


def main(_):
    from hyperlora import checkpointing, upstream

    params, record = upstream.convert(
        _SOURCE.value, _BASE.value, _ENCODER.value or '', _EMBEDDER.value or '', _DTYPE.value
    )
    output = cli.writable_directory(_OUTPUT.value)
    checkpointing.export(output, params, record, dtype='float32')
    kind = record['config']['hypernetwork']['name']
    print(f'converted {_SOURCE.value} ({kind}) to {output}')


if __name__ == '__main__':
    cli.run(main)
