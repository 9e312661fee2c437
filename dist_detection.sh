#!/usr/bin/env bash
# Train or test a detector with N processes on this machine, one per GPU (or on the CPU if there is none):
#   ./dist_detection.sh CONFIG N [/path/to/COCO] [any option of detection.py]
# For several machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same command on each.
config=${1:-}
n=${2:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 CONFIG NUMBER_OF_PROCESSES [DATA] [options] (got '$n' as the number)" >&2
    exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh" "$n" detection.py "$config" "${@:3}"
