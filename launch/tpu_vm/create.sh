#!/usr/bin/env bash
# Asks for a TPU VM slice, and installs this checkout on each of its machines once it is there:
#   NAME=twin ZONE=us-east5-a TYPE=v5p-128 RUNTIME=v2-alpha-tpuv5 launch/tpu_vm/create.sh [--spot]
# Options go to `queued-resources create`. After a preemption: the same again, then run.sh.
set -euo pipefail
: "${NAME:?}" "${ZONE:?}" "${TYPE:?}" "${RUNTIME:?}"
cd "$(dirname "$0")/../.."

resource() { gcloud compute tpus queued-resources "$@" --zone="$ZONE" --quiet; }
state() { resource describe "$NAME" --format='value(state.state)' 2>/dev/null || true; }

case $(state) in
  SUSPENDED | FAILED) resource delete "$NAME" --force ;; # what preemption leaves
esac
if [ -z "$(state)" ]; then
  resource create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" "$@"
fi
until [ "$(state)" = ACTIVE ]; do
  if [ "$(state)" = FAILED ]; then
    echo "create.sh: $NAME has failed: see queued-resources describe" >&2
    exit 1
  fi
  sleep "${POLL_SECONDS:-30}"
done

archive=$(mktemp -d)/l32jax.tar.gz
git archive --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$NAME:l32jax.tar.gz" --zone="$ZONE" --worker=all
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="
  mkdir -p l32jax && tar xzf l32jax.tar.gz -C l32jax && cd l32jax &&
  python3 -m venv .venv && .venv/bin/pip install -q -c requirements/constraints.txt -e '.[tpu]'"
