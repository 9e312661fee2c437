"""Launching of a program that trains: one process with fitting settings, or several by torchrun.

    python -m convmlp.common.launch N SCRIPT|-m MODULE [arguments]

Several machines: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, and run the same line on each. MAX_RESTARTS=3
starts a run that failed again, up to three times; it goes on from its last checkpoint.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

ENVIRONMENT = {
    # A step's large buffers stay with the process for its next step: to get fresh pages from the system each time costs
    # a CPU more than it computes with them (docs/performance.md). Both are settings of glibc, and only together they do
    # it: no block comes from mmap, and freed memory (in bytes) is not given back. MALLOC_MMAP_THRESHOLD_ would not do:
    # some versions of glibc refuse more than 32 MiB.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    # Threads that wait for one another sleep. Spinning, they keep the cores from those they wait for as soon as any
    # other program is at work (docs/performance.md).
    "OMP_WAIT_POLICY": "PASSIVE",
}


def launch(processes: int, program: Sequence[str], **environment: str) -> NoReturn:
    """Let a program take the place of this one, in so many processes on this machine.

    `program` is what python is called with: a script or -m and a module, and arguments.
    """
    settings = {**ENVIRONMENT, **environment, **os.environ}
    nodes, restarts = settings.get("NNODES") or "1", settings.get("MAX_RESTARTS") or "0"
    command = [sys.executable, *program]
    if (processes, nodes, restarts) != (1, "1", "0"):
        from .devices import count_cores

        settings.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // processes)))
        where = ["--standalone"]
        if nodes != "1" or settings.get("MASTER_PORT"):
            where = ["--nnodes", nodes, "--node-rank", settings.get("NODE_RANK") or "0"]
            where += ["--master-addr", settings.get("MASTER_ADDR") or "127.0.0.1"]
            where += ["--master-port", settings.get("MASTER_PORT") or "29500"]
        torchrun = [sys.executable, "-m", "convmlp.common.elastic", *where]
        command = [*torchrun, "--nproc-per-node", str(processes), "--max-restarts", restarts, *program]
    if os.name != "posix":  # where a program cannot take the place of another
        sys.exit(subprocess.call(command, env=settings))
    sys.stdout.flush()
    os.execve(command[0], command, settings)


if __name__ == "__main__":
    launch(int(sys.argv[1]), sys.argv[2:])
