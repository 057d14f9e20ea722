#!/bin/bash
# Two machines of four GPUs without a scheduler, DDP. Launch it with this on both (the first argument is the first machine's name):
#
#   bash configs/distributed/two_nodes.sh node1 configs/fudan_news.yaml output_dir=/shared/runs/fudan
#
# output_dir and the data must lie on a file system that both see. Whoever comes first waits for the other.

set -euo pipefail
HEAD=$1
shift
torchrun --nnodes=2 --nproc-per-node=4 --rdzv-id=labeltune --rdzv-backend=c10d --rdzv-endpoint="$HEAD:29500" -m labeltune train "$@"
