#!/usr/bin/env bash
# What the dist_*.sh have in common: run a script of this repository with N processes (src/convmlp/common/launch.py).
#   tools/launch.sh N SCRIPT [arguments of the script]
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

exec "$python" -m convmlp.common.launch "$n" "$script" "$@"
