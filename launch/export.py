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
    keys = ('config', 'base_fingerprint', 'encoder_fingerprint', 'step')
    output = cli.writable_directory(_OUTPUT.value)
    # What launch.convert wrote is of no step.
    checkpointing.export(output, params, {key: meta[key] for key in keys if key in meta})
    step = f'step {meta["step"]} of ' if 'step' in meta else ''
    print(f'exported {step}{_WORKDIR.value} to {output}')


if __name__ == '__main__':
    cli.run(main)
