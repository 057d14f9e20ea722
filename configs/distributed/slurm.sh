#!/bin/bash
# Two nodes of four GPUs under Slurm, DDP; one torchrun a node starts the node's processes. Launch it with:
#
#   sbatch configs/distributed/slurm.sh configs/fudan_news.yaml output_dir=/shared/runs/fudan
#
# output_dir and the data must lie on a file system that all nodes see. Run the same command with --resume at the end to go on.

#SBATCH --job-name=labeltune
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300      # five minutes before the end: the step is finished and saved

set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=$((SLURM_CPUS_PER_TASK / 4))

srun --kill-on-bad-exit=1 torchrun \
    --nnodes="$SLURM_NNODES" --nproc-per-node=4 \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" \
    -m labeltune train "$@"
