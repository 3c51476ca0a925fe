"""The machine and library versions that every manifest records, and the cache folder."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from cogumi.core.amounts import size

_PAUSE_HARD = 2  # omp.h
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
    """Number of threads to use: the available processors, or OMP_NUM_THREADS if smaller.

    Under launchers of several processes (WORLD_SIZE is set), such as `accelerate launch`, which sets OMP_NUM_THREADS to
    1 for work on GPUs, that variable is ignored.
    """
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if not chosen.isdecimal() or "WORLD_SIZE" in os.environ:
        return processors
    return min(processors, max(int(chosen), 1))


def end_idle_threads() -> None:
    """End the OpenMP threads that the calling thread used last, if GNU's library is loaded.

    Its barriers stop spinning once all teams of a process together exceed the processors: on two cores, llama.cpp made
    20 passes a second in a process in which torch had computed before, 55 to 65 without torch or after this call.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD).omp_pause_resource_all(_PAUSE_HARD)


def available_memory() -> int:
    """Bytes of memory that further processes can use before the machine swaps."""
    import psutil

    return int(psutil.virtual_memory().available)


def total_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def beyond_memory(needed: int) -> str:
    """The words "takes .., this machine has .. of memory" if that many bytes exceed its memory, else empty."""
    memory = total_memory()
    return f"takes {size(needed)}, this machine has {size(memory)} of memory" if needed > memory else ""


def peak_rss_bytes() -> int:
    """Peak resident memory of this process or of its largest finished child."""
    unit = 1 if platform.system() == "Darwin" else 1024
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    try:  # after a fork, getrusage also counts the memory of the parent process
        status = Path("/proc/self/status").read_text("ascii")
        return max(children, int(status.partition("VmHWM:")[2].split()[0]) * 1024)
    except (OSError, IndexError):
        return max(children, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def environment(threads: int) -> dict[str, Any]:
    """What determines output bytes besides the fingerprint: versions, threads, the source's commit or null."""
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
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        commit = result.stdout.strip() or None
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "threads": threads,
        "commit": commit,
        "libraries": versions,
    }


def cache_folder() -> Path:
    """Folder for measurements and unpacked files: $COGUMI_CACHE, else the platform's user cache folder."""
    if chosen := os.environ.get("COGUMI_CACHE"):
        return Path(chosen)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "darwin":
        base = str(home / "Library" / "Caches")
    elif sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA", str(home / "AppData" / "Local"))
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(home / ".cache")
    return Path(base) / "cogumi"
