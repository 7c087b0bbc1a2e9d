#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster that xpk has made or adapted:
#   NAME=twin CLUSTER=pods PROJECT=… ZONE=us-east5-a IMAGE=… TYPE=v5p-32 SLICES=2 \
#     launch/gke/xpk.sh CONFIG.py [FIELD=VALUE ...]
# IMAGE has l32jax and the config. XPK_OPTIONS go to xpk, such as --spot, or --dry-run, which prints
# the JobSet. xpk by itself would start again after neither 1 (failed) nor 75 (saved).
set -euo pipefail
: "${NAME:?}" "${CLUSTER:?}" "${PROJECT:?}" "${ZONE:?}" "${IMAGE:?}" "${TYPE:?}" "${SLICES:?}"

# shellcheck disable=SC2086  # several options are several words
xpk workload create --workload="$NAME" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --docker-image="$IMAGE" --tpu-type="$TYPE" --num-slices="$SLICES" ${XPK_OPTIONS:-} \
  --restart-on-exit-codes=1,75 --max-restarts=50 --termination-grace-period-seconds=300 \
  --command="l32jax train$(printf ' %q' "$@")"
