"""Settings of a test session: a separate empty cache, and the environment of processes that tests start."""

import importlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings

import cogumi

# A busy machine must not fail a test.
settings.register_profile("without_clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("without_clock")

# A console made while COLUMNS is set keeps that width: made here, it has the width that each test sets.
os.environ.pop("COLUMNS", None)
importlib.import_module("cogumi.cli.console")
# A worker of several has its cache inside that of the process that started it, which ends last and removes both.
_ABOVE = os.environ["COGUMI_CACHE"] if "PYTEST_XDIST_WORKER" in os.environ else None
CACHE = os.environ["COGUMI_CACHE"] = tempfile.mkdtemp(prefix="cogumi-cache-", dir=_ABOVE)

SOURCES = [str(Path(cogumi.__file__).parents[1]), str(Path(__file__).parent)]
os.environ["PYTHONPATH"] = os.pathsep.join(SOURCES)  # child processes import this checkout and `support`

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell has it for background jobs: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = ("test_tiny.py", "test_ranks.py", "test_bench.py", "test_loop.py", "test_real_models.py")
"""The slowest files. They start first, so that at the end no process runs one of them alone."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)
