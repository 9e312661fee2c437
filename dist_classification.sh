#!/usr/bin/env bash
# Train or evaluate a classifier with N processes on this machine, one per GPU (or on the CPU if there is none):
#   ./dist_classification.sh N -c CONFIG [any option of classification.py] DATA
# For several machines, set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same command on each.
n=${1:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 NUMBER_OF_PROCESSES -c CONFIG [options] DATA (got '$n' as the number)" >&2
    exit 2
fi
exec "$(dirname "${BASH_SOURCE[0]}")/tools/launch.sh" "$n" classification.py "${@:2}"
