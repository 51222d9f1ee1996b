#!/bin/bash
# A SLURM of two virtual nodes on this machine, for tests.
#   mini_slurm.sh start FOLDER [PORT]   writes FOLDER/slurm.conf, waits until both nodes are idle;
#                                       takes three ports, from 26817 unless told otherwise
#   mini_slurm.sh stop FOLDER
# Needs root and the packages slurmctld, slurmd, slurm-client and munge.
set -eu
verb=$1
home=$(realpath -m "$2")
port=${3:-26817}
export SLURM_CONF=$home/slurm.conf

wait_until() { # wait_until SECONDS COMMAND...
  local left=$(($1 * 4))
  shift
  until "$@" >/dev/null 2>&1; do
    ((left-- > 0)) || { echo "timed out waiting for: $*" >&2; return 1; }
    sleep 0.25
  done
}

both_idle() { [ "$(sinfo --noheader --Node --format=%t | grep -c '^idle$')" = 2 ]; }

write_config() {
  cat >"$SLURM_CONF" <<CONFIG
ClusterName=fewstep
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool-%n
SlurmctldPidFile=$home/slurmctld.pid
SlurmdPidFile=$home/%n.pid
SlurmctldLogFile=$home/slurmctld.log
SlurmdLogFile=$home/%n.log
AuthType=auth/munge
CredType=cred/munge
# A requeued job may not start before its credential has expired: two minutes by default.
AuthInfo=cred_expire=5
# No cgroups, no accounts, no MPI: none of them is needed, and containers lack them.
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1
ReturnToService=2
JobRequeue=1
KillWait=5
NodeName=virtual[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONFIG
}

start() {
  mkdir -p "$home/state" "$home/spool-virtual1" "$home/spool-virtual2"
  write_config
  if ! munge --no-input >/dev/null 2>&1; then
    install -d -o munge -g munge -m 755 /run/munge
    rm -f /run/munge/munge.socket.*
    setpriv --reuid munge --regid munge --clear-groups /usr/sbin/munged
    touch "$home/munge_is_ours"
    wait_until 10 munge --no-input
  fi
  slurmctld -c -f "$SLURM_CONF"
  for node in virtual1 virtual2; do slurmd -N "$node" -f "$SLURM_CONF"; done
  wait_until 30 both_idle
}

no_jobs() {
  [ -z "$(squeue -h)" ]
}

stop() {
  # A job that still ends would be left behind by the daemons, with its processes.
  squeue -h -o %A | xargs -r scancel || true
  wait_until 20 no_jobs || true
  for daemon in virtual1 virtual2 slurmctld; do
    if [ -f "$home/$daemon.pid" ]; then kill "$(cat "$home/$daemon.pid")" || true; fi
  done
  if [ -f "$home/munge_is_ours" ]; then kill "$(cat /run/munge/munged.pid)" || true; fi
}

case $verb in
  start | stop) "$verb" ;;
  *) echo "unknown verb $verb" >&2; exit 2 ;;
esac
