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
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def peak_rss_bytes() -> int:
    """The largest resident memory of this process or of any one child it has waited for, so far."""
    usage = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usage) * (1 if platform.system() == "Darwin" else 1024)


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
