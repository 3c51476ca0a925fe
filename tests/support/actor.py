"""A stage for tests of executors: as configured, it waits for files, prints, fails or ends its process."""

import os
import time
from pathlib import Path

from pydantic import BaseModel, ConfigDict

VERSION = 1
KIND = "toy"
INPUTS: dict[str, str] = {}


class Config(BaseModel):
    """`arrive` is a file to create first, `wait_for` are files to wait for. Paths are `str`, so they are not inputs."""

    model_config = ConfigDict(extra="forbid")
    arrive: str | None = None
    wait_for: list[str] = []
    prints: str = ""
    exits: int | None = None
    divide_by: int = 1


def run(config, inputs, out, context):
    context.progress(0, None, {"pid": os.getpid()})
    print(config.prints, end="")
    if config.arrive:
        Path(config.arrive).touch()
    if config.exits is not None:
        os._exit(config.exits)
    while not all(Path(name).exists() for name in config.wait_for):
        time.sleep(0.01)
    (out / "weights-0.bin").write_bytes(b"1")
    return {"pid": os.getpid(), "quotient": 1 / config.divide_by}
