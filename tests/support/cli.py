"""Run `cogumi` as a real process."""

import subprocess
import sys

from support.waiting import PATIENCE

COGUMI = [sys.executable, "-m", "cogumi"]


def cogumi(*words, cwd=None, stdin="", ok=0):
    """Run a command to its end and check its exit code; with one thread, because other tests may be running."""
    if words[0] in ("chat", "eval"):
        words += ("--threads", "1")
    done = subprocess.run(
        [*COGUMI, *map(str, words)], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == ok, done.stderr
    return done


def one_line(done):
    """Check for one line on standard error and nothing on standard output; return the line."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("cogumi: ")
    return done.stderr
