"""Adds an adapter to its base model and writes the sum as a Hugging Face model folder.

python -m launch.merge --adapter=DIR --output=DIR [--base=NAME_OR_DIR] [--dtype=float32]
"""

from absl import flags

from hyperlora.errors import UserError
from launch import cli

_ADAPTER = flags.DEFINE_string('adapter', None, 'Folder of the adapter.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)
_BASE = flags.DEFINE_string('base', None, 'Base model; default: the one the adapter names.')
_DTYPE = flags.DEFINE_enum(
    'dtype', 'float32', ['float32', 'bfloat16', 'float16'], 'Of the file; the sum is taken in f32.'
)


def main(_):
    from hyperlora import adapters

    base = _BASE.value or adapters.base_name(_ADAPTER.value)
    output = cli.writable_directory(_OUTPUT.value)
    if any(output.iterdir()):
        raise UserError(f'{output} is not empty; choose another folder')
    from hyperlora.session import Session

    session = Session(base=base)
    session.save_merged(session.load(_ADAPTER.value), output, _DTYPE.value)
    size = sum(path.stat().st_size for path in output.iterdir())
    print(f'{session.base.name} with {_ADAPTER.value} merged, {size} bytes, in {output}')


if __name__ == '__main__':
    cli.run(main)
