#!/usr/bin/env bash
# What the dist_*.sh have in common: run a script of this repository with N processes by torchrun, or with one by itself.
#   tools/launch.sh N SCRIPT [arguments of the script]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each.
# MAX_RESTARTS=3 starts a run that failed again, up to three times; it goes on from its last checkpoint.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
n=$1
script=$root/$2
shift 2

# The first interpreter that has convmlp: $PYTHON, that of an active environment, that of `make install`.
python=
for candidate in ${PYTHON:+"$PYTHON"} python "$root/.venv/bin/python" python3; do
    if "$candidate" -c 'import importlib.util as u; raise SystemExit(u.find_spec("convmlp") is None)' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [[ -z $python ]]; then
    echo "no Python here has convmlp: run 'make install', or pip install -e '.[all]'" >&2
    exit 2
fi

# A step's large buffers stay with the process for its next step: to get fresh pages from the system each time costs a CPU
# more than it computes with them (docs/performance.md). Both are settings of glibc, and only together they do it: no
# block comes from mmap, and freed memory (in bytes) is not given back. MALLOC_MMAP_THRESHOLD_ would not do: some versions
# of glibc refuse more than 32 MiB.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8000000000}

if [[ $n == 1 && ${NNODES:-1} == 1 && ${MAX_RESTARTS:-0} == 0 ]]; then
    exec "$python" "$script" "$@"
fi
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > n ? cores / n : 1))}
if [[ ${NNODES:-1} == 1 && -z ${MASTER_PORT:-} ]]; then
    where=(--standalone)
else
    where=(--nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
        --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}")
fi
exec "$python" -m convmlp.common.launch "${where[@]}" --nproc-per-node "$n" --max-restarts "${MAX_RESTARTS:-0}" "$script" "$@"
