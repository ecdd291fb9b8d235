#!/bin/bash
# One job, some nodes, one torchrun on each; see docs/multinode.md.
#
#     sbatch configs/slurm.sh configs/gpt2_124m.toml --out_dir=/shared/run1      arguments go to train.py
#     sbatch --nodes=4 configs/slurm.sh ...                                      options before it go to SLURM
#
# Submit from the repository's root. out_dir must be on a file system that all nodes see.

#SBATCH --job-name=nanoscale
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1             # torchrun starts the 8 ranks itself
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --requeue                       # after a node's failure the job starts again, at the newest checkpoint
#SBATCH --signal=TERM@120               # two minutes before the end: the ranks save and stop

set -euo pipefail

GPUS=${SLURM_GPUS_ON_NODE:-8}
HOST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
PORT=$((29500 + SLURM_JOB_ID % 1000))   # two jobs on one node do not meet

export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-8} / GPUS))
# export NCCL_SOCKET_IFNAME==ib0 NCCL_DEBUG=INFO      # where NCCL takes the wrong network

srun --kill-on-bad-exit=1 torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc_per_node="$GPUS" \
    --rdzv_id="$SLURM_JOB_ID" --rdzv_backend=c10d --rdzv_endpoint="$HOST:$PORT" --max_restarts=3 \
    --shutdown_timeout=110 train.py "$@"   # else torchrun kills what is not saved in 30 seconds
