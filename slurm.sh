#!/usr/bin/env bash
# Train on whole nodes of a SLURM cluster. After the end of its time, a preemption or a fault the job is queued again
# and goes on, until the run is finished:
#
#     sbatch --nodes 4 --time 24:00:00 slurm.sh RUN --size 6.9b --data PREFIX ...        RUN is train.py's --out
#
# Submit it from the checkout. RUN, PREFIX and the checkout must lie on a file system that all nodes share.

# srun starts one torchrun on every node, and that a rank for every GPU. Adapt the next three lines to your nodes.
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive

# Ten minutes before the end of its time a signal has the run save and stop.
# TERM: torchrun passes it on to its ranks. The customary USR1 kills torchrun, and SLURM then whatever is left of it.
# No prefix B: so the signal goes to what srun has started, and not to this shell, which queues the job again. With it,
# the signal would come here only; and srun, if it were handed on, makes a KILL of a TERM.
# To stop by hand, `scancel --signal=TERM JOB` does the same, and the job is queued again. A plain scancel ends the job:
# it leaves KillWait, usually half a minute, to save.
#SBATCH --signal=TERM@600

# Let the job be queued again, by us or when a node fails, and then write on in the same log.
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --job-name=tripod
#SBATCH --output=%x-%j.log

set -euo pipefail
run=$1
shift
[ ! -d .venv ] || . .venv/bin/activate

# Or torchrun kills ranks that take more than 30 s to save. (torch 2.11 does so all the same.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600
# srun has not taken this from the job since SLURM 22.05: all ranks of a node would share one core.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
# If nodes do not find each other, or by a slow network, name the fast one as `ip address` does:
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# The ranks meet on the first node. Jobs that share it must not share the port.
read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

newest_step() {
    local steps=("$run"/step*)
    printf '%s\n' "${steps[@]##*/step}" | sort -n | tail -n 1
}

before=$(newest_step)
# --kill-on-bad-exit: when torchrun gives up on one node, others must not wait for it.
# exec: SLURM signals only the processes that it has started itself, which must not be a shell.
# shellcheck disable=SC2016 # the variables are for the shell on the node
srun --kill-on-bad-exit=1 bash -c 'exec torchrun --nnodes "$SLURM_NNODES" --node-rank "$SLURM_NODEID" \
    --nproc-per-node "$SLURM_GPUS_ON_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" train.py "$@"' \
    - --out "$run" "$@" && exit

if [ "$(newest_step)" = "$before" ]; then
    echo "slurm.sh: no new checkpoint in $run, it would only fail again: not queued again" >&2
    exit 1
fi
scontrol requeue "$SLURM_JOB_ID"
