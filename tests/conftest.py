"""What is measured once per machine is measured once per test session here, and leaves nothing behind."""

import os
import shutil
import tempfile

os.environ.pop("COLUMNS", None)  # read once, when the console is made: tests choose their own width
# Each of several workers has one of its own inside that of the process that started them, which ends last.
_ABOVE = os.environ["COGUMI_CACHE"] if "PYTEST_XDIST_WORKER" in os.environ else None
CACHE = os.environ["COGUMI_CACHE"] = tempfile.mkdtemp(prefix="cogumi-cache-", dir=_ABOVE)

LONG = ("test_tiny.py", "test_ranks.py", "test_bench.py", "test_loop.py", "test_real_models.py")
"""Files that take longest: they are begun first, so that no process works on one alone at the end."""


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


def pytest_unconfigure():
    shutil.rmtree(CACHE, ignore_errors=True)
