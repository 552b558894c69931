#!/usr/bin/env bash
# Train on whole nodes of a SLURM cluster. When its time is over, after a preemption, or after a fault, the job
# is queued again and resumes, until the run is finished:
#
#     sbatch --nodes 4 --time 24:00:00 slurm.sh RUN --size 6.9b --data PREFIX ...        RUN is train.py's --out
#
# Submit it from the checkout. RUN, PREFIX and the checkout must be on a file system that all nodes share.

# srun starts one torchrun on every node; torchrun starts one rank for every GPU. Adapt GPUs and CPUs to your nodes.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive

# Ten minutes before the end of its time SLURM sends a signal, and the run saves and stops.
# TERM: torchrun forwards it to its ranks. The usual USR1 kills torchrun, and then SLURM kills the ranks.
# No prefix B: the signal goes to the processes that srun has started. With B it goes only to this shell, which must
# live to queue the job again, and which cannot forward it: srun turns TERM into KILL.
# To stop by hand, use `scancel --signal=TERM JOB`: the run saves and the job is queued again. A plain scancel ends the
# job and gives it only KillWait (usually 30 seconds) to save.
#SBATCH --signal=TERM@600

# The job may be queued again, by this script or after a node failed. It appends to the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --job-name=tripod
#SBATCH --output=%x-%j.log

set -euo pipefail
run=$1
shift
[ ! -d .venv ] || . .venv/bin/activate

# Without this, torchrun kills ranks that take more than 30 seconds to save. (torch 2.11 ignores it and kills them.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# Since SLURM 22.05 srun does not inherit --cpus-per-task. Without this, all ranks of a node share one core.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# If nodes do not find each other, or use a slow network, set the interface of the fast one (see `ip address`):
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# The ranks connect to a port of the first node. Two jobs on one node must use different ports. A fixed address and port
# also keep torchrun from unpickling what others write into its store; see Security in docs/faults.md.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

newest_step() {
    local steps=("$run"/step*)
    printf '%s\n' "${steps[@]##*/step}" | sort -n | tail -n 1
}

before=$(newest_step)
# --kill-on-bad-exit: when torchrun fails on one node, the other nodes must not wait for it.
# exec: SLURM sends signals only to the process that it has started. This must be torchrun, not a shell.
# shellcheck disable=SC2016 # the shell on the node expands these variables
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" train.py "$@"' \
    - --out "$run" "$@" && exit

if [ "$(newest_step)" = "$before" ]; then
    echo "slurm.sh: no new checkpoint in $run, it would fail again: not queued again" >&2
    exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
