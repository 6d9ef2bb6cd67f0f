#!/usr/bin/env bash
# Trains on Cloud TPU slices that are requested as a queued resource.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/../shell.sh"

usage() {
  cat <<'TEXT'
usage: launch/tpu/pod.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- TRAINING FLAGS]

  watch    all of the below: requests the TPUs, installs, trains, and after a preemption does it
           again (training continues from its workdir); deletes the TPUs once training is done
  create   requests the TPUs
  setup    installs the code at the commit on every worker
  run      starts `python -m launch.train TRAINING FLAGS` on every worker, in the background
  logs     follows the log of one worker
  delete   gives the TPUs back

  --name=NAME         name of the queued resource
  --zone=ZONE         such as us-west4-a
  --project=PROJECT   default: the project that gcloud is configured for
  --type=TYPE         accelerator type such as v5litepod-64 (create, watch)
  --runtime=VERSION   runtime version (default: the one for JAX on that type)
  --slices=N          slices of that type (default 1)
  --spot              cheaper TPUs that can be preempted (default: on demand)
  --repo=URL          what workers clone (default: the remote `origin` of this checkout)
  --commit=REVISION   what they check out (default: HEAD); it must have been pushed
  --prepare=COMMAND   run in the checkout on every worker after the installation, say to fetch the
                      weights of the base model
  --worker=N          whose log (default 0)
  --poll=SECONDS      how often watch looks (default 60)
  --dry-run           prints the commands instead of running them

TRAINING FLAGS need --config=FILE and --workdir=gs://BUCKET/FOLDER.
TEXT
}

MAX_FAILURES=3 # of the training or of the request; preemptions are not counted.

say() { printf 'pod.sh: %s\n' "$*" >&2; }

execute() {
  if [[ $dry_run ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# ------------------------------------------------------------------------------ the commands

queued_resources() {
  local verb=$1
  shift
  execute gcloud compute tpus queued-resources "$verb" "$@" --zone="$zone" --project="$project" \
    --quiet
}

on_every_worker() { queued_resources ssh "$name" --node=all --worker=all --command="$1"; }

create() {
  local flags=(--accelerator-type="$type" --runtime-version="$runtime")
  if ((slices > 1)); then
    flags+=(--node-count="$slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  if [[ $spot ]]; then
    flags+=(--spot)
  fi
  queued_resources create "$name" "${flags[@]}"
}

setup() {
  # uv brings its own Python: the images' one is older than what this code needs.
  on_every_worker "set -e
[ -d hyperlora ] || git clone --quiet $(quote "$repo") hyperlora
cd hyperlora
git fetch --quiet origin
git checkout --quiet --detach $commit
python3 -m pip install --quiet --user uv
[ -d .venv ] || python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python -e '.[tpu,gcs]'
$prepare"
}

run() {
  # The lock is held for as long as the training lives; its exit code outlives it.
  local training
  training="$(quote .venv/bin/python -m launch.train --distributed "${train[@]}")"
  on_every_worker "cd hyperlora || exit 1
flock --nonblock train.lock true || { echo 'a training runs here already' >&2; exit 1; }
rm -f train.status
nohup flock train.lock bash -c $(quote "$training; echo \$? > train.status") \
>> train.log 2>&1 < /dev/null &"
}

# Ends what is left of a training of which a worker has failed.
clear_workers() {
  on_every_worker 'cd hyperlora || exit 1
fuser --kill --silent train.lock 2> /dev/null || true
flock --wait 60 train.lock true'
}

logs() {
  queued_resources ssh "$name" --worker="$worker" --command='tail -n 100 -F hyperlora/train.log'
}

delete() { queued_resources delete "$name" --force; }

# ------------------------------------------------------------------------------ the loop

# ABSENT, UNKNOWN (nothing could be learnt), or a state such as ACTIVE.
resource_state() {
  local state
  if state=$(queued_resources list --filter="name~/$name\$" --format='value(state.state)'); then
    echo "${state:-ABSENT}"
  else
    echo UNKNOWN
  fi
}

# absent (not started since the VM exists), running, unreachable, or its exit code.
training_state() {
  queued_resources ssh "$name" --node=0 --worker=0 --command='cd hyperlora 2> /dev/null || {
echo absent; exit; }
if ! flock --nonblock train.lock true; then echo running
elif [ -f train.status ]; then cat train.status
else echo absent; fi' || echo unreachable
}

failed() {
  failures=$((failures + 1))
  say "$1 (failure $failures of at most $MAX_FAILURES)"
  if ((failures == MAX_FAILURES)); then
    give_up
  fi
}

give_up() {
  queued_resources ssh "$name" --worker=0 --command='tail -n 30 hyperlora/train.log' >&2 || true
  say "gave up; the TPUs are kept, and billed, until: launch/tpu/pod.sh delete --name=$name" \
    "--zone=$zone --project=$project"
  exit 1
}

watch() {
  local state training
  local crashed=''
  failures=0
  while true; do
    state=$(resource_state)
    case $state in
      ABSENT)
        say 'requests the TPUs'
        create || failed 'the TPUs could not be requested'
        ;;
      SUSPENDED)
        say 'preempted: requests the TPUs anew'
        crashed=''
        { delete && create; } || failed 'the TPUs could not be requested anew'
        ;;
      FAILED)
        failed 'the request failed'
        { delete && create; } || true # the next look shows what is left
        ;;
      ACTIVE)
        training=$(training_state | tail -n 1)
        say "ACTIVE, training: $training"
        case $training in
          running) crashed='' ;;
          unreachable) ;;
          absent) { setup && run; } || failed 'training could not be started' ;;
          0)
            say 'training is done: gives the TPUs back'
            if delete; then return; fi
            failed 'the TPUs could not be given back'
            ;;
          2)
            say 'training refused its flags or data'
            give_up
            ;;
          *)
            # Workers also die when another one is preempted, which the state tells a little later.
            if [[ ! $crashed ]]; then
              crashed=1
            else
              crashed=''
              # 75: it was told to stop, and saved.
              [[ $training == 75 ]] || failed "training ended with exit code $training"
              clear_workers || true
              run || true
            fi
            ;;
        esac
        ;;
      *) say "$state" ;;
    esac
    sleep "$poll"
  done
}

explain_watch() {
  echo "# every $poll s, by the state of the queued resource:"
  resource_state
  echo '# none: request it'
  create
  echo '# ACTIVE: see what the training does'
  training_state
  echo '# ACTIVE, not started: install and start'
  setup
  run
  echo "# ACTIVE, training failed twice in a row: restart, $MAX_FAILURES failures at most"
  clear_workers
  run
  echo '# SUSPENDED (preempted) or FAILED: request it anew, which leads to a new start'
  delete
  create
  echo '# ACTIVE, training done'
  delete
}

# ------------------------------------------------------------------------------ the arguments

command=${1:-}
case $command in
  -h | --help | help)
    usage
    exit
    ;;
  create | setup | run | logs | watch | delete) shift ;;
  *) mistake "the first argument is '$command': give watch, create, setup, run, logs or delete" ;;
esac

name='' zone='' project='' type='' runtime='' slices=1 spot='' repo='' commit=HEAD prepare=''
worker=0 poll=60 dry_run=''
while (($#)); do
  argument=$1
  shift
  case $argument in
    --dry-run) dry_run=1 ;;
    --spot) spot=1 ;;
    --) break ;;
    --name=* | --zone=* | --project=* | --type=* | --runtime=* | --slices=* | --repo=* | \
      --commit=* | --prepare=* | --worker=* | --poll=*)
      option=${argument%%=*}
      printf -v "${option#--}" '%s' "${argument#*=}"
      ;;
    *) mistake "$argument: no such option (options are --NAME=VALUE, see --help; flags of the" \
      "training come after --)" ;;
  esac
done
train=("$@")

require() { # OPTION VALUE EXAMPLE
  [[ $2 ]] || mistake "--$1 is missing: $command needs it, as in --$1=$3"
}

whole_number() { # OPTION VALUE MINIMUM
  if ! [[ $2 =~ ^[0-9]+$ ]] || (($2 < $3)); then
    mistake "--$1=$2: give a whole number from $3 on"
  fi
}

require name "$name" hyperlora
[[ $name =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
  mistake "--name=$name: give at most 50 lower-case letters, digits and hyphens, a letter first"
require zone "$zone" us-west4-a
whole_number slices "$slices" 1
whole_number worker "$worker" 0
whole_number poll "$poll" 0
if [[ ! $project ]]; then
  project=$(gcloud config get-value project 2> /dev/null) || true
fi
require project "$project" my-project

if [[ $command == create || $command == watch ]]; then
  require type "$type" v5litepod-64
  if [[ ! $runtime ]]; then
    case $type in
      v6e-*) runtime=v2-alpha-tpuv6e ;;
      v5p-*) runtime=v2-alpha-tpuv5 ;;
      v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
      v[234]-*) runtime=tpu-ubuntu2204-base ;;
      *) mistake "--type=$type: its runtime version is not known here; add --runtime=VERSION" ;;
    esac
  fi
fi

if [[ $command == setup || $command == watch ]]; then
  root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
  if [[ ! $repo ]]; then
    repo=$(git -C "$root" remote get-url origin 2> /dev/null) || true
  fi
  require repo "$repo" https://github.com/OWNER/REPOSITORY
  # A branch may move between two starts of one training; a commit cannot.
  if [[ ! $commit =~ ^[0-9a-f]{40}$ ]]; then
    revision=$commit
    commit=$(git -C "$root" rev-parse --quiet --verify "$revision^{commit}" 2> /dev/null) ||
      mistake "--commit=$revision: no such revision in this checkout; give a branch, tag or commit"
  fi
fi

if [[ $command == run || $command == watch ]]; then
  [[ " ${train[*]:-} " == *' --config='* ]] ||
    mistake '--config is missing: add -- --config=FILE --workdir=gs://BUCKET/FOLDER at the end'
  [[ " ${train[*]} " == *' --workdir=gs://'* ]] ||
    mistake '--workdir is missing or not on gs://, and the disks of TPU workers do not last: add' \
      '--workdir=gs://BUCKET/FOLDER after --'
elif ((${#train[@]})); then
  mistake "${train[0]}: $command takes no flags of the training (only run and watch do)"
fi

if [[ ! $dry_run ]]; then
  command -v gcloud > /dev/null || mistake 'gcloud is not installed: see cloud.google.com/sdk'
fi

if [[ $dry_run && $command == watch ]]; then
  explain_watch
else
  "$command"
fi
