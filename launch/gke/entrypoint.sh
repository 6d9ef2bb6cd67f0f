#!/usr/bin/env bash
# Trains, and tells a training that was stopped from one that is done.
#
# Both exit with 0, which Kubernetes would count as done. When the pod is told to go (SIGTERM), the
# training saves and this exits with 75 ("try again"): the pod has failed and the JobSet restarts.
set -euo pipefail

stopped=''
# shellcheck disable=SC2317 # The trap calls it.
# shellcheck disable=SC2329  # The trap calls it.
stop() {
  stopped=1
  trap '' TERM
  kill -TERM "$training" 2> /dev/null || true
}

python -m launch.train --distributed "$@" &
training=$!
trap stop TERM

code=0
wait "$training" || code=$?
if [[ $stopped ]]; then # The signal ended only the wait.
  code=0
  wait "$training" || code=$?
fi
if [[ $stopped && $code == 0 ]]; then
  exit 75
fi
exit "$code"
