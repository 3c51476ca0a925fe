"""The machine that manifests record, and its threads."""

import subprocess
import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_idle_threads_of_training_end():
    """Two threads of torch are gone after the call, and come back with the next operation."""
    code = """
import os, torch
from cogumi.core.environment import end_idle_threads
torch.set_num_threads(3)
def threads(): return len(os.listdir("/proc/self/task"))
def work(): (torch.ones(600, 600) @ torch.ones(600, 600)).exp().sum().item()
before = threads()
work(); busy = threads()
end_idle_threads(); idle = threads()
work(); again = threads()
print(busy - before, idle - before, again - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    busy, idle, again = map(int, done.stdout.split())
    assert busy == again > idle
