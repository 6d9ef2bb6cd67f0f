"""Submits a training on TPU slices of a GKE cluster, as a JobSet.

    python launch/gke/submit.py --name=NAME --image=IMAGE:COMMIT --accelerator=v5e --topology=8x8 \
        [--slices=N] [--dry-run] -- --config=FILE --workdir=gs://BUCKET/FOLDER [...]

Needs kubectl, set to a cluster that has JobSet and node pools of that accelerator and topology, as
`xpk cluster create` makes them. Only the standard library is used, so any Python will do.
"""

import argparse
import json
import math
import pathlib
import re
import shlex
import string
import subprocess
import sys

# Generation: its label on GKE and the number of axes of its topologies.
ACCELERATORS = {
    'v4': ('tpu-v4-podslice', 3),
    'v5e': ('tpu-v5-lite-podslice', 2),
    'v5p': ('tpu-v5p-slice', 3),
    'v6e': ('tpu-v6e-slice', 2),
}
_APPLY = ['kubectl', 'apply', '--filename=-']


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'error: {message} (see --help)\n')


def parse(argv) -> argparse.Namespace:
    """Parses and checks the arguments; a mistake ends the process with one line and code 2."""
    parser = _Parser(
        prog='submit.py',
        usage='submit.py OPTIONS -- TRAINING FLAGS',
        description='Submits a training on TPU slices of a GKE cluster, as a JobSet.',
        allow_abbrev=False,
    )
    parser.add_argument('--name', required=True, help='name of the JobSet')
    parser.add_argument('--image', required=True, help='image of launch/gke/Dockerfile, tagged')
    parser.add_argument('--accelerator', required=True, choices=ACCELERATORS)
    parser.add_argument('--topology', required=True, help='chips of a slice by axis, such as 4x8')
    parser.add_argument('--slices', type=int, default=1, help='number of slices (default 1)')
    parser.add_argument(
        '--max-restarts', type=int, default=20, help='preemptions and crashes to survive'
    )
    parser.add_argument('--queue', help='Kueue queue (multislice-queue on clusters that xpk made)')
    parser.add_argument(
        '--service-account', default='default', help='Kubernetes account that may use the bucket'
    )
    parser.add_argument('--dry-run', action='store_true', help='print the manifest, submit nothing')
    own, train = argv, []
    if '--' in argv:
        own, train = argv[: argv.index('--')], argv[argv.index('--') + 1 :]
    args = parser.parse_args(own)
    args.train = train

    axes = ACCELERATORS[args.accelerator][1]
    sizes = [int(size) for size in re.findall(r'\d+', args.topology)]
    if not re.fullmatch(r'[1-9]\d*(x[1-9]\d*)*', args.topology) or len(sizes) != axes:
        example = '4x8' if axes == 2 else '4x4x8'
        parser.error(
            f'--topology={args.topology}: {args.accelerator} has {axes} axes; give it as {example}'
        )
    args.chips = math.prod(sizes)
    if args.chips != 1 and args.chips % 4:
        parser.error(
            f'--topology={args.topology}: {args.chips} chips do not fill hosts of 4; give a '
            'topology of 1 chip or a multiple of 4'
        )
    if not re.fullmatch(r'[a-z]([-a-z0-9]{0,38}[a-z0-9])?', args.name):
        parser.error(
            f'--name={args.name}: give at most 40 lower-case letters, digits and hyphens, a letter '
            'first'
        )
    if not re.search(r'(:(?!latest$)[^/:]+|@sha256:[0-9a-f]{64})$', args.image):
        parser.error(
            f'--image={args.image}: give the tag of a commit (IMAGE:COMMIT), so that every restart '
            'runs the same code'
        )
    if args.slices < 1:
        parser.error(f'--slices={args.slices}: give a whole number from 1 on')
    if args.max_restarts < 0:
        parser.error(f'--max-restarts={args.max_restarts}: give a whole number from 0 on')
    if not any(flag.startswith('--config=') for flag in train):
        parser.error('--config is missing: add -- --config=FILE --workdir=gs://... at the end')
    if not any(flag.startswith('--workdir=gs://') for flag in train):
        parser.error(
            '--workdir is missing or not on gs://, and the disks of pods do not last: add '
            '--workdir=gs://BUCKET/FOLDER after --'
        )
    return args


def manifest(args: argparse.Namespace) -> str:
    """The JobSet as YAML."""
    chips_per_host = min(args.chips, 4)
    template = pathlib.Path(__file__).with_name('jobset.yaml').read_text(encoding='utf-8')
    values = {
        'name': args.name,
        'labels': {'kueue.x-k8s.io/queue-name': args.queue} if args.queue else {},
        'max_restarts': args.max_restarts,
        'slices': args.slices,
        'hosts': args.chips // chips_per_host,
        'service_account': args.service_account,
        'accelerator': ACCELERATORS[args.accelerator][0],
        'topology': args.topology,
        'image': args.image,
        # Kubernetes would expand $(NAME); $$ stands for one dollar sign.
        'args': [flag.replace('$', '$$') for flag in args.train],
        'chips_per_host': chips_per_host,
    }
    # JSON is YAML: whatever the values hold, they stay values.
    return string.Template(template).substitute(
        {name: json.dumps(value) for name, value in values.items()}
    )


def main(argv=None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    text = manifest(args)
    if args.dry_run:
        print(f'# {shlex.join(_APPLY)} reads:\n{text}', end='')
        return 0
    try:
        return subprocess.run(_APPLY, input=text, text=True).returncode
    except FileNotFoundError:
        print(
            'error: kubectl is not installed: see kubernetes.io/docs/tasks/tools', file=sys.stderr
        )
        return 2


if __name__ == '__main__':
    sys.exit(main())
