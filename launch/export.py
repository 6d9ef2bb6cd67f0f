"""Writes the weights of a training as a folder to ship: params.safetensors and config.json.

    python -m launch.export --workdir=TRAINING --output=DIR

The latest checkpoint is taken; the training may go on meanwhile. DIR can then be given to any
command as --checkpoint.
"""

from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Workdir of a training.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)


def main(_):
    from hyperlora import checkpointing, trained

    _, params, meta = trained.read(_WORKDIR.value)
    kept = {key: meta[key] for key in ('config', 'base_fingerprint', 'encoder_fingerprint', 'step')}
    checkpointing.export(_OUTPUT.value, params, kept)
    print(f'exported step {meta["step"]} of {_WORKDIR.value} to {_OUTPUT.value}')


if __name__ == '__main__':
    cli.run(main)
