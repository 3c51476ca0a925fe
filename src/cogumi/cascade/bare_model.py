"""Opens a model without calibration: it answers, P(correct) is None, no answer is accepted (SPEC M1)."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from cogumi.bundle.format import INDEX
from cogumi.bundle.packed import is_packed
from cogumi.cascade.cascade import Cascade
from cogumi.cascade.engines import EngineOptions
from cogumi.cascade.history import History
from cogumi.cascade.memory.turns import FILE, Memory
from cogumi.cascade.modes import Settings
from cogumi.cascade.services import Services
from cogumi.cascade.tiers import Tiers
from cogumi.confidence.gate import Calibration
from cogumi.core.environment import beyond_memory
from cogumi.core.errors import BundleError
from cogumi.core.model_files import CONFIG, GGUF, is_short_name, locate_model
from cogumi.core.registry import engine
from cogumi.core.weight_files import stored_weights
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine

FP32 = 4


def bare_model(name: str | Path) -> Path | None:
    """The GGUF file or Hugging Face folder that a name stands for; None for a bundle and for everything else."""
    path = Path(name)
    if path.is_file():
        return path if path.suffix == GGUF else None
    if (path / INDEX).is_file() or (path.is_dir() and is_packed(path)):
        return None
    if is_short_name(str(name), Path()):
        return locate_model(str(name), Path())
    return path if (path / CONFIG).is_file() else None


def open_model(path: Path, options: EngineOptions, settings: Settings, state: Path | None) -> Cascade:
    """A cascade whose base is a GGUF file in llama.cpp, or a Hugging Face folder in torch. Raises `BundleError`."""
    with ExitStack() as opened:
        base = _engine(path, options)
        opened.callback(base.close)
        memory = Memory(state / FILE) if state else None
        if memory:
            opened.callback(memory.close)
        services = Services(
            Tiers(base, base, None), Calibration.none(), settings=settings, history=History(memory, model=str(path))
        )
        cascade = Cascade(services, workers=options.slots)
        opened.pop_all()
    return cascade


def _engine(path: Path, options: EngineOptions) -> Engine:
    if path.is_file():
        return LlamaEngine(path, **asdict(options))
    if options.cache is not None:
        raise BundleError(
            f"{path} is a folder, which runs in torch without a choice of the cache; convert it: cogumi convert"
        )
    if excess := beyond_memory(FP32 * stored_weights(path)):
        raise BundleError(f"{path} {excess} as fp32 weights; name a GGUF file of the model, or a smaller one")
    found: Engine = engine("torch")(path, context=options.context)
    return found
