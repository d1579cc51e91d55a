#!/usr/bin/env bash
# A real SLURM of two nodes on this machine, to try the batch scripts before they meet a cluster.
#
#   sudo apt-get install slurm-wlm munge
#   sudo slurm/local_cluster.sh start /tmp/slurm      # then: export SLURM_CONF=/tmp/slurm/slurm.conf
#   export MASTER_ADDR=127.0.0.1                      # the names n1 and n2 exist only in SLURM
#   sbatch --gpus-per-node=0 --cpus-per-task=1 slurm/fit.sbatch --config configs/quickstart/simclr.yaml
#   sudo slurm/local_cluster.sh stop /tmp/slurm
#
# Needs root. The nodes n1 and n2 are two slurmd on loopback, each with as many CPUs as this machine.
set -euo pipefail

action=${1:?"start or stop"}
dir=$(realpath -m "${2:?"a folder of the cluster's own"}")
port=${SLURM_LOCAL_PORT:-17000}
export SLURM_CONF=$dir/slurm.conf
export PATH=$PATH:/usr/sbin

stop() { # by the pid files, never by name
    for file in "$dir"/slurmd.n1.pid "$dir"/slurmd.n2.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
        [ -f "$file" ] && kill "$(cat "$file")" 2>/dev/null || true
    done
}

case $action in
stop) stop ;;
start)
    mkdir -p "$dir"/{state,spool.n1,spool.n2} /run/munge /var/log/munge
    chown munge: /run/munge /var/log/munge
    if ! munge -n 2>/dev/null | unmunge >/dev/null 2>&1; then
        [ -f /etc/munge/munge.key ] || { dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none
            chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
        runuser -u munge -- munged --force
        cp /run/munge/munged.pid "$dir/munged.pid"
    fi
    cat >"$SLURM_CONF" <<CONF
ClusterName=local
SlurmctldHost=localhost
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool.%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
AuthInfo=cred_expire=5
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=${SLURM_LOCAL_KILL_WAIT:-30}
OverTimeLimit=0
SlurmctldTimeout=30
SlurmdTimeout=${SLURM_LOCAL_NODE_TIMEOUT:-30}
MinJobAge=3600
NodeName=n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$(nproc)
NodeName=n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$(nproc)
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
CONF
    setsid slurmctld
    for node in n1 n2; do setsid slurmd -N $node; done
    for _ in $(seq 60); do
        [ "$(sinfo --noheader --format=%D --states=idle 2>/dev/null)" = 2 ] && exit 0
        sleep 0.5
    done
    echo "the nodes did not come up: see $dir/slurmctld.log and $dir/slurmd.n1.log" >&2
    stop
    exit 1
    ;;
*) echo "unknown action $action: start or stop" >&2; exit 2 ;;
esac
