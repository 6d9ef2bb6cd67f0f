"""Writes the weights of a training as a folder to ship: params.safetensors and config.json.

    python -m launch.export --workdir=TRAINING --output=DIR [--average_with=TRAINING2]

The latest checkpoint is taken; the training may go on meanwhile. DIR can then be given to any
command as --checkpoint. Runs of which one goes on from the other may be averaged: such weights are
often better on what was not trained on (Wortsman et al., arXiv 2203.05482).
"""

from absl import flags

from launch import cli

_WORKDIR = flags.DEFINE_string('workdir', None, 'Workdir of a training.', required=True)
_AVERAGE = flags.DEFINE_list(
    'average_with', [], 'Workdirs of more trainings, of the same form: the mean of all is written.'
)
_OUTPUT = flags.DEFINE_string('output', None, 'Folder to write.', required=True)


def main(_):
    import jax

    from hyperlora import checkpointing, trained

    _, params, meta = trained.read(_WORKDIR.value)
    others = []
    for name in _AVERAGE.value:
        folder, other, record = trained.read(name)
        checkpointing.check_models(record, meta)
        trained.check_fit(folder, params, other)
        others.append(other)
    params = jax.tree.map(lambda *x: sum(x) / len(x), params, *others)
    keys = ('config', 'base_fingerprint', 'encoder_fingerprint', 'step')
    output = cli.writable_directory(_OUTPUT.value)
    # What launch.convert wrote is of no step.
    checkpointing.export(output, params, {key: meta[key] for key in keys if key in meta})
    step = f'step {meta["step"]} of ' if 'step' in meta else ''
    mean = f', averaged with {", ".join(_AVERAGE.value)},' if others else ''
    print(f'exported {step}{_WORKDIR.value}{mean} to {output}')


if __name__ == '__main__':
    cli.run(main)
