"""The scripts that start trainings on TPU pods, GKE and Slurm: what they would run, and do run.

The cloud's and the cluster's commands are played by small stand-ins first on the PATH.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

_TOOLS = ['bash', 'cat', 'dirname', 'env', 'flock', 'git', 'head', 'nohup', 'rm', 'sed', 'sleep']
_TOOLS += ['tail', 'touch', 'true']
_ROOT = pathlib.Path(__file__).parent.parent
_SCRIPTS = sorted((_ROOT / 'launch').rglob('*.sh'))
_COMMIT = '0123456789' * 4
_TRAIN = ['--config=configs/d2l_niah.py:smollm2', '--workdir=gs://bucket/run 1', "--config.x=it's"]
_POD = ['launch/tpu/pod.sh']
_WHERE = ['--name=niah', '--zone=us-west4-a', '--project=lab']
_WHAT = ['--type=v5litepod-64', '--repo=https://host/a b', f'--commit={_COMMIT}']
_GKE = [sys.executable, 'launch/gke/submit.py']
_JOBSET = ['--name=niah', f'--image=registry/hyperlora:{_COMMIT}', '--accelerator=v5e']
_SLURM = ['launch/slurm/submit.sh']
_GPUS = ['--nodes=2', '--gpus-per-node=8', '--time=12:00:00']


@pytest.fixture
def stand_in(tmp_path):
    """Puts a bash script into `tmp_path/bin`, which else has a few tools of the system alone."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for tool in _TOOLS:
        if path := shutil.which(tool):
            (folder / tool).symlink_to(path)

    def stand_in(name, text):
        (folder / name).write_text(f'#!/usr/bin/env bash\n{text}\n')
        (folder / name).chmod(0o755)

    return stand_in


@pytest.fixture
def start(stand_in, tmp_path):
    """Starts a command in the repository, with `tmp_path` as home and `tmp_path/bin` as PATH."""

    def start(*command, **environment):
        return subprocess.Popen(
            list(map(str, command)),
            cwd=_ROOT,
            env={'PATH': f'{tmp_path}/bin', 'HOME': str(tmp_path), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def run(start):
    """Runs a command to its end, which must be with exit code `code`; returns stdout, stderr."""

    def run(*command, code=0, **environment):
        process = start(*command, **environment)
        out, errors = process.communicate(timeout=60)
        assert process.returncode == code, out + errors
        return out, errors

    return run


def _commands(printed):
    """The commands of a dry run: what follows `gcloud compute tpus queued-resources`."""
    found = []
    for line in shlex.split(printed.replace('\ngcloud', ' \n; gcloud'), comments=True):
        if line == 'gcloud':
            found.append([])
        elif line != ';':
            found[-1].append(line)
    for words in found:
        assert words[:3] == ['compute', 'tpus', 'queued-resources']
        assert {'--zone=us-west4-a', '--project=lab', '--quiet'} <= set(words)
    return [words[3:] for words in found]


def _option(words, name):
    (value,) = (word.split('=', 1)[1] for word in words if word.startswith(f'--{name}='))
    return value


# ------------------------------------------------------------------------------ all scripts


@pytest.mark.parametrize('script', _SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_valid_and_strict(run, script):
    run('bash', '-n', script)
    if script.name != 'shell.sh':  # Sourced by the others.
        assert '\nset -euo pipefail\n' in script.read_text()
        assert os.access(script, os.X_OK)


def test_shellcheck(run):
    run(pathlib.Path(sys.executable).with_name('shellcheck'), *_SCRIPTS)


@pytest.mark.parametrize(
    'command, message',
    [
        (_POD, "the first argument is ''"),
        ([*_POD, 'strat'], "the first argument is 'strat'"),
        ([*_POD, 'create', '--zone=z', '--project=p'], '--name is missing'),
        ([*_POD, 'create', '--name=n', '--project=p'], '--zone is missing'),
        ([*_POD, 'create', '--name=n', '--zone=z'], '--project is missing'),
        ([*_POD, 'create', '--name=N n', '--zone=z'], '--name=N n: give'),
        ([*_POD, 'create', *_WHERE], '--type is missing'),
        ([*_POD, 'create', *_WHERE, '--type=v9-8'], 'add --runtime=VERSION'),
        ([*_POD, 'create', *_WHERE, '--type=v4-8', '--slices=0'], '--slices=0: give a whole'),
        ([*_POD, 'create', *_WHERE, '--spto'], '--spto: no such option'),
        ([*_POD, 'create', '--zone', 'z'], '--zone: no such option (options are --NAME=VALUE'),
        (
            [*_POD, 'setup', *_WHERE, '--repo=r', '--commit=no-branch'],
            '--commit=no-branch: no such',
        ),
        ([*_POD, 'run', *_WHERE], '--config is missing'),
        ([*_POD, 'run', *_WHERE, '--', '--config=c'], '--workdir is missing'),
        ([*_POD, 'run', *_WHERE, '--', '--config=c', '--workdir=/tmp'], 'not on gs://'),
        ([*_POD, 'delete', *_WHERE, '--', '--config=c'], '--config=c: delete takes no flags'),
        ([*_POD, 'delete', *_WHERE], 'gcloud is not installed'),
        ([*_GKE, '--name=n'], '--image, --accelerator, --topology'),
        ([*_GKE, *_JOBSET, '--topology=4x4x4', '--', *_TRAIN], 'v5e has 2 axes; give it as 4x8'),
        ([*_GKE, *_JOBSET, '--topology=4by4', '--', *_TRAIN], '--topology=4by4'),
        ([*_GKE, *_JOBSET, '--topology=3x3', '--', *_TRAIN], '9 chips do not fill hosts of 4'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--slices=0', '--', *_TRAIN], '--slices=0'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--sliecs=2', '--', *_TRAIN], '--sliecs=2'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--image=i:latest', '--', *_TRAIN], 'IMAGE:COMMIT'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--image=h:5000/i', '--', *_TRAIN], 'IMAGE:COMMIT'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--name=a_b', '--', *_TRAIN], '--name=a_b: give'),
        ([*_GKE, *_JOBSET, '--topology=4x4'], '--config is missing'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--', '--config=c', '--workdir=w'], 'not on gs://'),
        ([*_GKE, *_JOBSET, '--topology=4x4', '--', *_TRAIN], 'kubectl is not installed'),
        (_SLURM, "--nodes=''"),
        ([*_SLURM, '--nodes=2', '--time=1'], "--gpus-per-node=''"),
        ([*_SLURM, '--nodes=2', '--gpus-per-node=8'], '--time is missing'),
        ([*_SLURM, *_GPUS, '-p', 'gpu'], '-p: no such option'),
        ([*_SLURM, *_GPUS, '--config=c'], '--config=c: flags of the training come after --'),
        ([*_SLURM, *_GPUS], '--config is missing'),
        ([*_SLURM, *_GPUS, '--', '--config=c'], '--workdir is missing'),
        ([*_SLURM, *_GPUS, '--', *_TRAIN], 'sbatch is not installed'),
    ],
)
def test_a_mistake_is_one_line_and_code_2(run, command, message):
    out, errors = run(*command, code=2)
    assert out == ''
    (line,) = errors.splitlines()
    assert line.startswith('error: ') and message in line


# ------------------------------------------------------------------------------ Cloud TPU


def test_create_requests_what_was_asked_for(run):
    def create(*options):
        (words,) = _commands(run(*_POD, 'create', *_WHERE, *options, '--dry-run')[0])
        assert words[:2] == ['create', 'niah']
        return words

    words = create('--type=v5litepod-64')
    assert _option(words, 'accelerator-type') == 'v5litepod-64'
    assert _option(words, 'runtime-version') == 'v2-alpha-tpuv5-lite'
    assert _option(words, 'node-id') == 'niah'
    assert '--spot' not in words
    words = create('--type=v6e-256', '--slices=2', '--spot')
    assert _option(words, 'runtime-version') == 'v2-alpha-tpuv6e'
    assert (_option(words, 'node-count'), _option(words, 'node-prefix')) == ('2', 'niah')
    assert '--spot' in words
    assert not any(word.startswith('--node-id') for word in words)
    words = create('--type=v9-8', '--runtime=tpu9')
    assert _option(words, 'runtime-version') == 'tpu9'


def test_setup_pins_the_commit_on_all_workers(run):
    options = [*_WHERE, *_WHAT[1:], '--prepare=cp -r /mnt/weights .', '--dry-run']
    (words,) = _commands(run(*_POD, 'setup', *options)[0])
    assert words[:4] == ['ssh', 'niah', '--node=all', '--worker=all']
    lines = _option(words, 'command').splitlines()
    assert lines[0] == 'set -e'
    assert lines[1] == "[ -d hyperlora ] || git clone --quiet 'https://host/a b' hyperlora"
    checkout = lines.index(f'git checkout --quiet --detach {_COMMIT}')
    (install,) = (i for i, line in enumerate(lines) if line.endswith("-e '.[tpu,gcs]'"))
    assert lines.index('cd hyperlora') < checkout < install
    assert lines[-1] == 'cp -r /mnt/weights .'


def test_a_branch_is_pinned_when_the_script_starts(run, tmp_path):
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b', '-C', tmp_path / 'checkout']
    shutil.copytree(_ROOT / 'launch', tmp_path / 'checkout' / 'launch')
    run(*git, 'init', '--quiet', '--initial-branch=topic')
    run(*git, 'remote', 'add', 'origin', 'https://host/origin')
    run(*git, 'commit', '--quiet', '--allow-empty', '--message=one')
    commit = run(*git, 'rev-parse', 'HEAD')[0].strip()
    script = tmp_path / 'checkout' / 'launch/tpu/pod.sh'
    for options in [], ['--commit=topic']:
        printed, _ = run(script, 'setup', *_WHERE, *options, '--dry-run')
        assert f'git checkout --quiet --detach {commit}\n' in printed
        assert 'git clone --quiet https://host/origin ' in printed


def test_watch_prints_its_plan_in_order(run):
    printed, _ = run(*_POD, 'watch', *_WHERE, *_WHAT, '--spot', '--dry-run', '--', *_TRAIN)
    verbs = [words[0] for words in _commands(printed)]
    assert verbs == [
        *('list', 'create', 'ssh', 'ssh', 'ssh'),  # request, look, install, start
        *('ssh', 'ssh'),  # restart
        *('delete', 'create'),  # after a preemption
        'delete',  # at the end
    ]


@pytest.fixture
def worker(run, stand_in, tmp_path):
    """A worker: `ssh` runs the command on this machine, in a home where the code is set up."""
    stand_in(
        'gcloud',
        'for word; do case $word in --command=*) cd; exec bash -c "${word#*=}" ;; esac; done',
    )
    home = tmp_path / 'hyperlora'
    (home / '.venv/bin').mkdir(parents=True)

    def train(script):
        python = home / '.venv/bin/python'
        python.write_text(f'#!/usr/bin/env bash\n{script}\n')
        python.chmod(0o755)
        run(*_POD, 'run', *_WHERE, '--', *_TRAIN)

    def look():
        printed, _ = run(*_POD, 'watch', *_WHERE, *_WHAT, '--dry-run', '--', *_TRAIN)
        return run('bash', '-c', 'cd; ' + _option(_commands(printed)[2], 'command'))[0].strip()

    return home, train, look


def _wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_training_gets_its_flags_verbatim_and_leaves_its_exit_code(worker):
    home, train, look = worker
    assert look() == 'absent'
    train('printf "%s\\n" "$@" > flags; echo text; echo more >&2; exit 3')
    _wait_for(lambda: look() == '3')
    assert (home / 'flags').read_text().splitlines() == [
        *('-m', 'launch.train', '--distributed'),
        *_TRAIN,
    ]
    assert (home / 'train.log').read_text() == 'text\nmore\n'


def test_a_worker_trains_once_at_a_time(worker, run):
    home, train, look = worker
    train('until [ -e go ]; do sleep 0.1; done')
    try:
        _wait_for(lambda: look() == 'running')
        _, errors = run(*_POD, 'run', *_WHERE, '--', *_TRAIN, code=1)
        assert 'a training runs here already' in errors
    finally:
        (home / 'go').touch()
    _wait_for(lambda: look() == '0')


# Each call of gcloud is noted in `calls`; the answers to `list` and to the question of what the
# training does are the lines of `states` and `trainings`, one a call.
_CLOUD = """
cd "$HOME"
verb=$4
next() { head -n 1 "$1"; sed -i 1d "$1"; }
for word; do case $word in --command=*) command=${word#*=};; esac; done
case $verb in
  ssh)
    case $command in
      *'echo absent'*) verb=look; next trainings ;;
      *'git clone'*) verb=setup ;;
      *nohup*) verb=run ;;
      *fuser*) verb=clear ;;
      tail*) verb=tail; echo 'the last line' ;;
    esac ;;
  list) next states ;;
esac
case $verb in list | look) ;; *) echo "$verb" >> calls; esac
! [ -e "fail-$verb" ]
"""


@pytest.fixture
def watch(run, stand_in, tmp_path):
    stand_in('gcloud', _CLOUD)

    def watch(states, trainings, code=0):
        (tmp_path / 'states').write_text(''.join(f'{state}\n' for state in states))
        (tmp_path / 'trainings').write_text(''.join(f'{training}\n' for training in trainings))
        _, errors = run(*_POD, 'watch', *_WHERE, *_WHAT, '--poll=0', '--', *_TRAIN, code=code)
        assert (tmp_path / 'states').read_text() == (tmp_path / 'trainings').read_text() == ''
        return (tmp_path / 'calls').read_text().split(), errors

    return watch


def test_watch_trains_through_a_preemption(watch):
    states = ['', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE', 'ACTIVE']  # requested, trains
    states += ['ACTIVE', 'SUSPENDING', 'SUSPENDED', 'PROVISIONING', 'ACTIVE', 'ACTIVE', 'ACTIVE']
    trainings = ['absent', 'running', '134', 'absent', 'running', '0']
    calls, _ = watch(states, trainings)
    assert calls == ['create', 'setup', 'run', 'delete', 'create', 'setup', 'run', 'delete']


def test_watch_goes_on_with_a_training_that_was_told_to_stop(watch):
    states = ['ACTIVE', 'SUSPENDING', 'SUSPENDED', '', 'ACTIVE']  # before the preemption shows
    calls, _ = watch(states, ['75', '0'])
    assert calls == ['delete', 'create', 'create', 'delete']
    calls, errors = watch(['ACTIVE'] * 9, ['75'] * 8 + ['0'])  # by hand: no failure
    assert calls[4:] == ['clear', 'run'] * 4 + ['delete']
    assert 'failure' not in errors


def test_watch_restarts_a_crashed_training_but_not_for_ever(watch):
    calls, errors = watch(['ACTIVE'] * 6, ['1'] * 6, code=1)
    assert calls == ['clear', 'run'] * 2 + ['tail']
    assert 'the last line' in errors and 'pod.sh delete --name=niah' in errors


def test_watch_stops_when_the_training_refuses_its_flags(watch):
    calls, errors = watch(['ACTIVE'], ['2'], code=1)
    assert calls == ['tail']
    assert 'refused' in errors


def test_watch_requests_anew_when_a_request_fails_but_not_for_ever(watch):
    calls, _ = watch(['FAILED'] * 3, [], code=1)
    assert calls == ['delete', 'create'] * 2 + ['tail']


def test_watch_goes_on_when_gcloud_fails_but_not_for_ever(watch, tmp_path):
    (tmp_path / 'fail-create').touch()
    calls, errors = watch(['', '', ''], [], code=1)
    assert calls == ['create'] * 3 + ['tail'] and 'could not be requested' in errors
    (tmp_path / 'fail-delete').touch()
    calls, errors = watch(['ACTIVE'] * 3, ['0'] * 3, code=1)
    assert calls[4:] == ['delete'] * 3 + ['tail']
    assert 'could not be given back' in errors and 'pod.sh delete --name=niah' in errors


def test_watch_survives_a_setup_that_is_cut_short(watch, tmp_path):
    (tmp_path / 'fail-setup').touch()
    calls, errors = watch(['ACTIVE'] * 3, ['absent'] * 3, code=1)
    assert calls == ['setup'] * 3 + ['tail']
    assert 'could not be started' in errors


# ------------------------------------------------------------------------------ GKE


@pytest.mark.parametrize(
    'accelerator, label, topology, slices, hosts, chips',
    [
        ('v5e', 'tpu-v5-lite-podslice', '1x1', 1, 1, 1),
        ('v5e', 'tpu-v5-lite-podslice', '2x4', 1, 2, 4),
        ('v5e', 'tpu-v5-lite-podslice', '16x16', 4, 64, 4),
        ('v6e', 'tpu-v6e-slice', '2x2', 1, 1, 4),
        ('v5p', 'tpu-v5p-slice', '4x4x8', 2, 32, 4),
        ('v4', 'tpu-v4-podslice', '2x2x1', 1, 1, 4),
    ],
)
def test_manifest(run, accelerator, label, topology, slices, hosts, chips):
    train = [*_TRAIN, '--config.note=a: "$(HOME)" # {$name}']
    options = [*_JOBSET[:2], f'--accelerator={accelerator}', f'--topology={topology}']
    printed = run(*_GKE, *options, f'--slices={slices}', '--dry-run', '--', *train)[0]
    jobset = yaml.safe_load(printed)
    assert (jobset['apiVersion'], jobset['kind']) == ('jobset.x-k8s.io/v1alpha2', 'JobSet')
    assert jobset['metadata']['name'] == 'niah'
    assert jobset['spec']['failurePolicy']['maxRestarts'] == 20
    (group,) = jobset['spec']['replicatedJobs']
    job = group['template']['spec']
    pod = job['template']['spec']
    assert group['replicas'] == slices
    assert (job['parallelism'], job['completions'], job['backoffLimit']) == (hosts, hosts, 0)
    assert pod['nodeSelector'] == {
        'cloud.google.com/gke-tpu-accelerator': label,
        'cloud.google.com/gke-tpu-topology': topology,
    }
    (container,) = pod['containers']
    assert container['resources']['limits'] == {'google.com/tpu': chips}
    assert container['image'] == f'registry/hyperlora:{_COMMIT}'
    assert [flag.replace('$$', '$') for flag in container['args']] == train
    assert '$(HOME)' not in ''.join(container['args']).replace('$$', '')
    (rule,) = job['podFailurePolicy']['rules']
    assert rule['onExitCodes'] == {
        'containerName': container['name'],
        'operator': 'In',
        'values': [2],
    }


def test_submit_gives_the_manifest_to_kubectl(run, stand_in, tmp_path):
    stand_in('kubectl', 'echo "$@" > "$HOME/flags"; cat > "$HOME/manifest"; exit 7')
    options = [*_JOBSET, '--topology=4x4', '--queue=multislice-queue', '--service-account=writer']
    run(*_GKE, *options, '--', *_TRAIN, code=7)
    assert (tmp_path / 'flags').read_text() == 'apply --filename=-\n'
    jobset = yaml.safe_load((tmp_path / 'manifest').read_text())
    assert jobset['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'multislice-queue'}
    (group,) = jobset['spec']['replicatedJobs']
    assert group['template']['spec']['template']['spec']['serviceAccountName'] == 'writer'


# ------------------------------------------------------------------------------ Slurm


def test_slurm_dry_run(run):
    options = [*_GPUS, '--partition=gpu', '--comment=two words']
    printed, _ = run(*_SLURM, *options, '--dry-run', '--', *_TRAIN)
    command, job = printed.split('\n', 1)
    assert shlex.split(command) == [
        'sbatch',
        *('--nodes=2', '--gpus-per-node=8', '--ntasks-per-node=8', '--time=12:00:00'),
        *('--partition=gpu', '--comment=two words'),
        str(_ROOT / 'launch/slurm/job.sh'),
        *_TRAIN,
    ]
    assert {'#SBATCH --requeue', '#SBATCH --signal=B:USR1@120'} <= set(job.splitlines())


def test_slurm_submits_what_it_prints(run, stand_in, tmp_path):
    stand_in('sbatch', 'printf "%s\\n" sbatch "$@" > "$HOME/submitted"')
    printed = run(*_SLURM, *_GPUS, '--dry-run', '--', *_TRAIN)[0].splitlines()[0]
    run(*_SLURM, *_GPUS, '--', *_TRAIN)
    assert (tmp_path / 'submitted').read_text().splitlines() == shlex.split(printed)


# srun waits for its tasks, of which scancel tells the one; it fails on any signal of its own.
_SRUN = """
printf '%s\\n' "$@" > "$HOME/srun"
until [ -e "$HOME/told" ]; do sleep 0.05; done
sleep 0.3
echo saved >> "$HOME/calls"
"""


def test_slurm_job_saves_and_requeues_before_the_time_limit(start, stand_in, tmp_path):
    stand_in('srun', _SRUN)
    stand_in('scancel', 'echo scancel "$@" >> "$HOME/calls"; touch "$HOME/told"')
    stand_in('scontrol', 'echo scontrol "$@" >> "$HOME/calls"')
    job = start('launch/slurm/job.sh', *_TRAIN, SLURM_JOB_ID='42')
    _wait_for((tmp_path / 'srun').exists)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 0
    assert (tmp_path / 'calls').read_text().splitlines() == [
        'scancel --signal=TERM 42.0',
        'saved',
        'scontrol requeue 42',
    ]
    words = (tmp_path / 'srun').read_text().splitlines()
    assert words[-6:] == ['-m', 'launch.train', '--distributed', *_TRAIN]


@pytest.mark.parametrize('code', [0, 1])
def test_slurm_job_that_ends_by_itself_is_not_requeued(run, stand_in, tmp_path, code):
    stand_in('srun', f'exit {code}')
    stand_in('scontrol', 'touch "$HOME/requeued"')
    run('launch/slurm/job.sh', *_TRAIN, code=code, SLURM_JOB_ID='42')
    assert not (tmp_path / 'requeued').exists()
