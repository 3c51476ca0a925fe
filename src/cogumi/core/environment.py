"""What a build runs on: the facts that every manifest records."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

LIBRARIES = (
    "cogumi",
    "gguf",
    "llama-cpp-python",
    "numpy",
    "peft",
    "safetensors",
    "scikit-learn",
    "tokenizers",
    "torch",
    "transformers",
)


def usable_threads() -> int:
    """Threads this process should use: its processors, or fewer if OMP_NUM_THREADS says so.

    Launchers of several processes, such as `accelerate launch`, set that variable to 1 for work on GPUs; with them it
    does not count.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if not chosen.isdecimal() or "WORLD_SIZE" in os.environ:
        return processors
    return min(processors, max(int(chosen), 1))


def available_memory() -> int:
    """Bytes of memory that further processes can use before the machine swaps."""
    import psutil

    return int(psutil.virtual_memory().available)


def peak_rss_bytes() -> int:
    """The largest resident memory of this process or of any one child it has waited for, so far."""
    unit = 1 if platform.system() == "Darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:  # getrusage counts, for a process started by another, also the memory of that one
        status = Path("/proc/self/status").read_text("ascii")
        return max(children, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    except (OSError, IndexError):
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def environment(threads: int) -> dict[str, Any]:
    """What equal bytes depend on besides the fingerprint: versions, threads, the source's commit or null."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    source = Path(__file__).parents[2]
    commit = None
    if (source / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(source), "rev-parse", "HEAD"]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = answer.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "commit": commit,
        "libraries": versions,
    }


def cache_folder() -> Path:
    """Where measurements are kept: COGUMI_CACHE, else a folder of the platform's place for the user's caches."""
    if chosen := os.environ.get("COGUMI_CACHE"):
        return Path(chosen)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        place = str(home / "Library" / "Caches")
    elif sys.platform == "win32":
        place = os.environ.get("LOCALAPPDATA", str(home / "AppData" / "Local"))
    else:
        place = os.environ.get("XDG_CACHE_HOME") or str(home / ".cache")
    return Path(place) / "cogumi"
