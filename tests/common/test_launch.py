"""Launching: the environment that a program finds, and the words that it gets."""

import json
import os
import subprocess
import sys

import pytest

from convmlp.common.devices import count_cores

# Page faults of a step that allocates two buffers of 64 and 32 MiB and frees them, once the first steps are over
COUNT_FAULTS = """
import ctypes, resource

libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    buffers = [libc.malloc(size << 20) for size in (64, 32)]
    for buffer, size in zip(buffers, (64, 32)):
        libc.memset(buffer, 1, size << 20)
    for buffer in buffers:
        libc.free(buffer)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def launched(*words: str, **environment: str) -> dict[str, str]:
    """The environment that a program finds, as launched with these settings."""
    command = [
        sys.executable,
        "-m",
        "convmlp.common.launch",
        *words,
        "-c",
        "import json, os; print(json.dumps({**os.environ}))",
    ]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    run = subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True, check=True)
    return json.loads(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_step_keeps_its_buffers():
    def faults(settings: dict[str, str]) -> int:
        command, plain = [sys.executable, "-c", COUNT_FAULTS], {"PATH": os.environ["PATH"]}
        return int(subprocess.run(command, env={**plain, **settings}, capture_output=True, check=True).stdout)

    settings = {name: value for name, value in launched("1").items() if name.startswith("MALLOC_")}
    assert faults(settings) < 100 < 10_000 < faults({})


def test_threads_that_wait_sleep_unless_the_user_wants_them_to_spin():
    assert launched("1", OMP_WAIT_POLICY="ACTIVE")["OMP_WAIT_POLICY"] == "ACTIVE"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    show = "import os; print(os.environ['OMP_WAIT_POLICY'])"
    command = [sys.executable, "-m", "convmlp.common.launch", "1", "-c", show]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout == "PASSIVE\n"


def test_an_empty_variable_counts_as_none():
    empty = dict.fromkeys(("NNODES", "NODE_RANK", "MASTER_PORT", "MASTER_ADDR", "MAX_RESTARTS"), "")
    assert "WORLD_SIZE" not in launched("1", **empty)


def test_own_settings_of_the_allocator_are_left_alone():
    assert launched("1", MALLOC_TRIM_THRESHOLD_="7000000000")["MALLOC_TRIM_THRESHOLD_"] == "7000000000"


def test_several_processes_share_the_cores_and_know_each_other(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys; print(*(os.environ[n] for n in ('WORLD_SIZE', 'OMP_NUM_THREADS')), *sys.argv[1:])"
    )
    command = [sys.executable, "-m", "convmlp.common.launch", "2", str(program), "--lr", "1"]
    plain = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    run = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == 2 * [f"2 {max(1, count_cores() // 2)} --lr 1"]
