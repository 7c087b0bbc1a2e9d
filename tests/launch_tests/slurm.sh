#!/usr/bin/env bash
# A real Slurm on this machine: a controller and two nodes, with all that they write in one folder.
#   tests/launch_tests/slurm.sh start FOLDER     then: export SLURM_CONF=FOLDER/slurm.conf
#   tests/launch_tests/slurm.sh stop FOLDER
# Needs root. Debian's packages are installed if they are missing. The nodes are called by addresses
# of the loopback interface, which resolve without a line in /etc/hosts.
set -euo pipefail

folder=$(realpath -m "$2")
export SLURM_CONF=$folder/slurm.conf
PATH=$PATH:/usr/sbin

start() {
  if ! command -v slurmctld >/dev/null || ! command -v munged >/dev/null; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends slurm-wlm munge
  fi
  mkdir -p "$folder"/{run,state,spool,log}
  chmod 755 "$folder" "$folder/run"
  dd if=/dev/urandom of="$folder/munge.key" bs=1024 count=1 status=none
  chmod 400 "$folder/munge.key"
  read -r controller first second < <(free_ports)
  configuration "$controller" "$first" "$second" >"$SLURM_CONF"
  munged --force --key-file="$folder/munge.key" --socket="$folder/run/munge.socket" \
    --pid-file="$folder/run/munged.pid" --log-file="$folder/log/munged.log" \
    --seed-file="$folder/munge.seed"
  slurmctld
  slurmd -N 127.0.0.1
  slurmd -N 127.0.0.2
  for _ in $(seq 60); do
    if [ "$(sinfo --noheader --states=idle --format=%D)" = 2 ]; then return; fi
    sleep 1
  done
  tail -n 20 "$folder"/log/*.log >&2
  exit 1
}

stop() {
  scancel --user=root 2>/dev/null || true
  local file
  for file in "$folder"/run/{slurmd.127.0.0.1,slurmd.127.0.0.2,slurmctld,munged}.pid; do
    if [ -s "$file" ]; then kill "$(cat "$file")" || true; fi
  done
}

free_ports() {
  python3 - <<'PYTHON'
import socket
sockets = [socket.create_server(("", 0)) for _ in range(3)]
print(*(each.getsockname()[1] for each in sockets))
PYTHON
}

configuration() {
  cat <<CONF
ClusterName=l32jax
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$1
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/run/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
KillWait=30
MinJobAge=600
SchedulerType=sched/backfill
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
NodeName=127.0.0.1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$2 CPUs=2 RealMemory=1000
NodeName=127.0.0.2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$3 CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
}

case $1 in
  start | stop) "$1" ;;
  *) sed -n '2,6p' "$0" >&2; exit 2 ;;
esac
