"""Devices: memory that is given back to the system."""

import os
import subprocess
import sys

import pytest

from convmlp.common.launch import ENVIRONMENT


@pytest.mark.skipif(sys.platform != "linux", reason="glibc keeps freed memory, other systems do not")
def test_freed_memory_is_given_back_when_asked_for():
    code = """
import psutil, torch
from convmlp.common.devices import return_freed_memory
blocks = [torch.ones(1 << 20) for _ in range(100)]
between = torch.ones(10)  # behind what is freed
del blocks
sizes = [psutil.Process().memory_info().rss / 2**20]
return_freed_memory()
print(*sizes, psutil.Process().memory_info().rss / 2**20)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    before, after = map(float, run.stdout.split())
    assert before - after > 300
