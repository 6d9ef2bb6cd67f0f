#!/usr/bin/env bash
# Submits a training to the GPUs of a Slurm cluster; it requeues itself until it is done.
set -euo pipefail
# shellcheck source=/dev/null
. "$(dirname "${BASH_SOURCE[0]}")/../shell.sh"

usage() {
  cat <<'TEXT'
usage: launch/slurm/submit.sh --nodes=N --gpus-per-node=N --time=LIMIT [SBATCH OPTIONS] [--dry-run]
           -- --config=FILE --workdir=FOLDER [TRAINING FLAGS]

Run it where `python -m launch.train` works: the job inherits the folder and the environment.
SBATCH OPTIONS go to sbatch as they are, such as --partition=gpu or --account=NAME.
  --dry-run   prints the command and the job instead of submitting it
TEXT
}

nodes='' gpus='' limit='' dry_run='' options=()
while (($#)); do
  argument=$1
  shift
  case $argument in
    -h | --help)
      usage
      exit
      ;;
    --dry-run) dry_run=1 ;;
    --) break ;;
    --nodes=*) nodes=${argument#*=} ;;
    --gpus-per-node=*) gpus=${argument#*=} ;;
    --time=*) limit=${argument#*=} ;;
    --config=* | --workdir=*)
      mistake "$argument: flags of the training come after --, as in -- $argument"
      ;;
    --*) options+=("$argument") ;;
    *) mistake "$argument: no such option (options are --NAME=VALUE, see --help)" ;;
  esac
done

[[ $nodes =~ ^[1-9][0-9]*$ ]] || mistake "--nodes='$nodes': give a whole number, as in --nodes=2"
[[ $gpus =~ ^[1-9][0-9]*$ ]] ||
  mistake "--gpus-per-node='$gpus': give the GPUs to use on each node, as in --gpus-per-node=8"
[[ $limit ]] || mistake '--time is missing: give the time limit of one run, as in --time=12:00:00'
[[ " $* " == *' --config='* ]] ||
  mistake '--config is missing: add -- --config=FILE --workdir=FOLDER at the end'
[[ " $* " == *' --workdir='* ]] ||
  mistake '--workdir is missing: add --workdir=FOLDER after --, on a disk that all nodes share'

job="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/job.sh"
submission=(sbatch --nodes="$nodes" --gpus-per-node="$gpus" --ntasks-per-node="$gpus"
  --time="$limit" ${options[@]+"${options[@]}"} "$job" "$@")

if [[ $dry_run ]]; then
  quote "${submission[@]}"
  printf '\n\n# %s\n' "$job"
  cat "$job"
else
  command -v sbatch > /dev/null || mistake 'sbatch is not installed: run this on a Slurm login node'
  "${submission[@]}"
fi
