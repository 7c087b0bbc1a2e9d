#!/usr/bin/env bash
# Trains on all machines of a slice that create.sh has made, and starts again what ends early:
#   NAME=twin ZONE=us-east5-a launch/tpu_vm/run.sh CONFIG.py [FIELD=VALUE ...]
# The run's directory has to be on a disk that all machines share. Machines find each other by their
# metadata. Ends with 0 (done), 2 (bad input), or after MAX_RESTARTS with what came last.
set -uo pipefail
: "${NAME:?}" "${ZONE:?}"
restarts=0 max_restarts=${MAX_RESTARTS:-50}
command="cd l32jax && exec .venv/bin/l32jax train$(printf ' %q' "$@")"

while true; do
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$command"
  code=$?
  case $code in 0 | 2) exit "$code" ;; esac
  if [ "$restarts" -ge "$max_restarts" ]; then exit "$code"; fi
  restarts=$((restarts + 1))
  echo "run.sh: exit code $code; restart $restarts of at most $max_restarts" >&2
  sleep "${POLL_SECONDS:-30}"
done
