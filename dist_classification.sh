#!/usr/bin/env bash
# Train or evaluate a classifier with N processes on this machine, one a GPU (or on the CPU where there is none):
#   ./dist_classification.sh N -c CONFIG [any option of classification.py] DATA
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

n=${1:-}
if ! [[ $n =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 NUMBER_OF_PROCESSES -c CONFIG [options] DATA (got '$n' as the number)" >&2
    exit 2
fi
shift

# The first interpreter that has convmlp: $PYTHON, that of an active environment, that of `make install`.
python=
for candidate in ${PYTHON:+"$PYTHON"} python "$here/.venv/bin/python" python3; do
    if "$candidate" -c 'import importlib.util as u; raise SystemExit(u.find_spec("convmlp") is None)' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    echo "$0: no Python here has convmlp: run 'make install', or pip install -e '.[timm]'" >&2
    exit 2
fi

if [[ $n == 1 && ${NNODES:-1} == 1 ]]; then
    exec "$python" "$here/classification.py" "$@"
fi
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > n ? cores / n : 1))}
if [[ ${NNODES:-1} == 1 && -z ${MASTER_PORT:-} ]]; then
    where=(--standalone)
else
    where=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$python" -m convmlp.launch "${where[@]}" --nproc-per-node "$n" "$here/classification.py" "$@"
