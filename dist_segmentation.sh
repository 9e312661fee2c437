#!/usr/bin/env bash
# Train or test a segmentor with N processes on this machine, one a GPU (or on the CPU where there is none):
#   ./dist_segmentation.sh CONFIG N [/path/to/ADE20k] [any option of segmentation.py]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each.
config=${1:-}
n=${2:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG NUMBER_OF_PROCESSES [DATA] [options] (got '$n' as the number)" >&2
    exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh" "$n" segmentation.py "$config" "${@:3}"
