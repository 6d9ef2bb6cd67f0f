#!/usr/bin/env bash
#SBATCH --job-name=hyperlora
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# The training as a Slurm job; launch/slurm/submit.sh submits it.
#
# 120 s before the time limit Slurm sends USR1 to this script: the training is told to save, then the
# job goes back into the queue, where it continues from its workdir. (TERM would not do for this: a
# job that its user cancels gets it too.) On a preemption Slurm stops and requeues the job itself.
set -euo pipefail

stopping=''
# shellcheck disable=SC2317 # The trap calls it.
# shellcheck disable=SC2329  # The trap calls it.
stop() {
  stopping=1
  trap '' USR1
  # To the tasks directly: srun turns a TERM of its own into a KILL of its tasks.
  scancel --signal=TERM "$SLURM_JOB_ID.0" || true
}
trap stop USR1

if [[ ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # srun does not take it over from sbatch.
fi
# One process a GPU, as JAX expects under Slurm: each sees all GPUs of its node and takes the one of
# its local rank.
srun --gpu-bind=none --kill-on-bad-exit=1 python -m launch.train --distributed "$@" &
steps=$!

code=0
wait "$steps" || code=$?
if [[ $stopping ]]; then # The signal ended only the wait.
  code=0
  wait "$steps" || code=$?
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
