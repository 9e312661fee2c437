"""tools/launch.sh: what the dist_*.sh have in common."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """What a script of launch.sh finds in its environment."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || env\n')
    python.chmod(0o755)
    own = {"PYTHON": str(python), "MALLOC_TRIM_THRESHOLD_": "7000000000"}
    script = [str(ROOT / "dist_classification.sh"), "1"]
    shown = subprocess.run(script, env={**os.environ, **own}, capture_output=True, text=True, check=True).stdout
    return dict(line.split("=", 1) for line in shown.splitlines() if line.startswith("MALLOC_"))


@pytest.mark.skipif(sys.platform != "linux", reason="a setting of glibc")
def test_a_step_keeps_its_buffers(environment):
    def faults(settings: dict[str, str]) -> int:
        command, plain = [sys.executable, "-c", COUNT_FAULTS], {"PATH": os.environ["PATH"]}
        return int(subprocess.run(command, env={**plain, **settings}, capture_output=True, check=True).stdout)

    assert faults(environment) < 100 < 10_000 < faults({})


def test_own_settings_of_the_allocator_are_left_alone(environment):
    assert environment["MALLOC_TRIM_THRESHOLD_"] == "7000000000"
