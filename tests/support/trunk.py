"""A modifier on upper layers, trained by a process of a distributed launch: the first one leads, the others help."""

import json
import os
import sys
from pathlib import Path

from cogumi.core.types import Artifact
from cogumi.train import modifier
from support.train import context

ROLES = {"examples": "data", "responses": "responses", "model": "llama"}


def run(root, home, config):
    """Run the stage in `home`; a helper has a folder of its own whose checkpoint is the leader's. Prints the phases."""
    rank = int(os.environ.get("RANK", "0"))
    out = home if rank == 0 else home.with_name(f"{home.name}-helper")
    out.mkdir(parents=True)
    if rank:
        (out / "checkpoint").symlink_to(home / "checkpoint")
    seen = set()
    found = {role: Artifact("test", root / name, "0", {}, {}) for role, name in ROLES.items()}
    progress = context(progress=lambda done, total, figures: seen.update(figures))
    metrics = modifier.run(modifier.Config(**config), found, out, progress)
    (out / "metrics.json").write_text(json.dumps({**metrics, "phases": sorted(seen)}))


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
