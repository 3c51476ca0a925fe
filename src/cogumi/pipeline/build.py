"""Runs a recipe: step after step, each into its own folder, skipping what is done, stopping at a failed gate.

A step's fingerprint is a hash over its stage, version, config, seed and the fingerprints of its inputs. While
it runs its folder holds `pending.json`; killed at any moment, the same command finds that file and lets the
stage go on from its own checkpoint. Only a manifest, written last, makes a step done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from pydantic import BaseModel, ValidationError

from cogumi.core import artifact
from cogumi.core.environment import environment, peak_rss_bytes, usable_threads
from cogumi.core.errors import ArtifactError, CogumiError, RecipeError
from cogumi.core.files import held, sha256, write_json
from cogumi.core.registry import stage
from cogumi.core.stage import CHECKPOINT, Context, Stage
from cogumi.core.types import Artifact
from cogumi.pipeline import ranks
from cogumi.pipeline.input_checks import input_problems
from cogumi.pipeline.quality_gates import check_gate
from cogumi.pipeline.recipe import LOGS, Recipe, Step, explain

REPORT_STAGE = "report"
PAGE = "report.md"
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DISK_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")


class Progress(Protocol):
    """Who watches a build. `started`, any number of `advanced`, then `finished`, for each step in turn."""

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Step `number` (from 1) begins; `reason` is empty, or says why work is continued or done again."""

    def advanced(self, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """`done` of `total` (None: unknown) units of work are behind us; `figures` are worth showing."""

    def finished(self, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """The step is done; `skipped` if it had been done before."""


class Silent:
    """A `Progress` that shows nothing."""

    def started(self, step: str, stage: str, number: int, of: int, reason: str) -> None:
        """Show nothing."""

    def advanced(self, done: int, total: int | None, figures: Mapping[str, float]) -> None:
        """Show nothing."""

    def finished(self, seconds: float, skipped: bool, metrics: Mapping[str, Any]) -> None:
        """Show nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    """A step with everything that is known before it runs."""

    step: Step
    stage: Stage
    config: BaseModel
    fingerprint: str

    @property
    def trains(self) -> bool:
        """Whether other processes may help: stages that train say `TRAINS = True`."""
        return getattr(self.stage, "TRAINS", False)


class Inputs(dict[str, Artifact]):
    """Role -> artifact; a role that the recipe does not give is a `RecipeError`."""

    def __missing__(self, role: str) -> Artifact:
        raise RecipeError(f"the stage needs an input '{role}'; given: {', '.join(self) or 'none'}")


def _digest(value: Any) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _with_content(value: Any, root: Path) -> Any:
    """A config value with every path in it joined by the hash of what lies there."""
    if isinstance(value, Mapping):
        return {key: _with_content(item, root) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_with_content(item, root) for item in value]
    if not isinstance(value, Path):
        return value
    path = root / value
    if not path.exists():
        raise RecipeError(f"there is no file {path}; check the path")
    names = artifact.file_names(path) if path.is_dir() else [path.name]
    folder = path if path.is_dir() else path.parent
    return [value.as_posix(), {name: sha256(folder / name) for name in names}]


def plan(recipe: Recipe, seed: int | None = None) -> list[Plan]:
    """Check a whole recipe against its stages and fingerprint every step; `RecipeError` names the step."""
    seed = recipe.seed if seed is None else seed
    plans: dict[str, Plan] = {}
    for step in recipe.steps:
        where = f"recipe {recipe.name}, step '{step.name}'"
        try:
            module = stage(step.stage)
            config = module.Config.model_validate(step.config)
            kinds = {role: plans[name].stage.KIND for role, name in step.inputs.items()}
            for problem in input_problems(module, config, kinds):
                raise RecipeError(problem)
            identity = {
                "stage": step.stage,
                "version": module.VERSION,
                "config": _with_content(config.model_dump(), recipe.root),
                "seed": seed,
                "inputs": {role: plans[name].fingerprint for role, name in step.inputs.items()},
            }
        except RecipeError as error:
            raise RecipeError(f"{where}: {error}") from error
        except ValidationError as error:
            raise RecipeError(f"{where}: {explain(error, module.Config)}") from error
        plans[step.name] = Plan(step, module, config, _digest(identity))
    return list(plans.values())


def _prepare(folder: Path, fingerprint: str) -> tuple[bool, str]:
    """Bring a step's folder into a state to skip or to start from; returns (done, reason to tell)."""
    reason = ""
    if (folder / artifact.MANIFEST).exists():
        try:
            if artifact.load(folder).fingerprint == fingerprint:
                artifact.verify(folder)
                return True, ""
            reason = "the recipe or an input changed"
        except ArtifactError as error:
            reason = str(error)
    elif _pending(folder) == fingerprint:
        for path in folder.iterdir():
            if path.name not in (artifact.PENDING, CHECKPOINT):
                _remove(path)
        return False, "goes on where it was interrupted"
    if folder.exists():
        (folder / artifact.PENDING).unlink(missing_ok=True)  # first: half a folder must not look continuable
        _remove(folder)
    write_json(folder / artifact.PENDING, {"fingerprint": fingerprint})
    return False, reason


def _pending(folder: Path) -> str | None:
    try:
        value = json.loads((folder / artifact.PENDING).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return value.get("fingerprint") if isinstance(value, dict) else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class _Named(AbstractContextManager[None]):
    """Puts a name before what went wrong within, and says a full disk plainly, whoever met it.

    Writers raise different exceptions for it (OSError, RuntimeError, safetensors' own): the text counts too.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        full = isinstance(error, OSError) and error.errno in _DISK_ERRORS
        if full or (isinstance(error, Exception) and any(words in str(error) for words in _DISK_WORDS)):
            raise CogumiError(
                f"{self.name}: the disk is full while writing {self.folder} ({error}); free space and run "
                "the same command again: finished steps are kept"
            ) from error
        if isinstance(error, CogumiError):
            raise type(error)(f"{self.name}: {error}") from error


@contextmanager
def _only_build(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it for this build alone."""
    with ExitStack() as lock:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".lock").touch()
            lock.enter_context(held(folder / ".lock"))
        except BlockingIOError:
            raise CogumiError(f"another build is running in {folder}; wait for it or choose another folder") from None
        except OSError as error:
            raise CogumiError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
        yield


def _run_step(p: Plan, folder: Path, inputs: Inputs, context: Context) -> None:
    """Run one stage and finish its folder; what it needed to go on is removed only when it is done."""
    started = time.perf_counter()
    metrics = p.stage.run(p.config, inputs, folder, context)
    artifact.finish(
        folder,
        kind=p.stage.KIND,
        fingerprint=p.fingerprint,
        parents={role: parent.fingerprint for role, parent in inputs.items()},
        metrics=metrics,
        environment={**environment(context.threads), "peak_rss_bytes": peak_rss_bytes()},
        seconds=time.perf_counter() - started,
    )


def build(recipe: Recipe, runs: Path, *, seed: int | None = None, progress: Progress | None = None) -> dict[str, Any]:
    """Run what is not done yet of a recipe in `runs/<recipe>` and return the report, also written there.

    Raises `RecipeError` before anything runs, `GateError` at a failed gate, and what a stage raises, with its
    step named. Whatever is finished stays finished.
    """
    began = time.perf_counter()
    seed = recipe.seed if seed is None else seed
    progress = Silent() if progress is None else progress
    plans = plan(recipe, seed)
    home = runs / recipe.folder
    context = Context(seed, usable_threads(), recipe.root, progress.advanced)
    done: dict[str, Artifact] = {}
    rows: list[dict[str, Any]] = []
    if ranks.rank() > 0:
        return _help(plans, home, context)
    with _only_build(home), ranks.leading(home) as leader:
        for number, p in enumerate(plans, 1):
            name, folder = p.step.name, home / p.step.name
            with _Named(f"step '{name}'", folder):
                skipped, reason = _prepare(folder, p.fingerprint)
                progress.started(name, p.step.stage, number, len(plans), reason)
                if not skipped:
                    inputs = Inputs({role: done[parent] for role, parent in p.step.inputs.items()})
                    if p.trains:
                        leader.train(name)
                    _run_step(p, folder, inputs, replace(context, logs=home / LOGS / name))
                for rest in (artifact.PENDING, CHECKPOINT):
                    _remove(folder / rest)
                done[name] = artifact.load(folder)
            seconds = artifact.read_manifest(folder).seconds
            progress.finished(seconds, skipped, done[name].metrics)
            rows.append(
                {
                    "name": name,
                    "stage": p.step.stage,
                    "seconds": seconds,
                    "skipped": skipped,
                    "metrics": dict(done[name].metrics),
                }
            )
            for gate in p.step.gates:
                check_gate(name, gate, done)
        return _report(recipe, plans, home, rows, time.perf_counter() - began)


def _help(plans: list[Plan], home: Path, context: Context) -> dict[str, Any]:
    """Train along with process 0 wherever it trains; it alone writes artifacts, and there is nothing to report."""
    by_name = {p.step.name: p for p in plans}
    quiet = replace(context, progress=lambda done, total, figures: None)
    for name in ranks.steps_to_join(home):
        p = by_name[name]
        inputs = Inputs({role: artifact.load(home / parent) for role, parent in p.step.inputs.items()})
        with ranks.helping(home, name) as folder:
            p.stage.run(p.config, inputs, folder, quiet)
    return {}


def _report(
    recipe: Recipe, plans: list[Plan], home: Path, rows: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Write `report.json`: the report step's figures at top level, its page and pictures beside it.

    A recipe that extends another leaves that one's report as it is, and writes `<recipe>-report.json`.
    """
    own = recipe.name == recipe.folder
    manifests = [artifact.read_manifest(home / p.step.name) for p in plans]
    report: dict[str, Any] = {}
    for p, manifest in zip(plans, manifests, strict=True):
        if p.step.stage == REPORT_STAGE:
            report |= manifest.metrics
            for name in manifest.files if own else ():
                if name == PAGE or ("/" not in name and name.endswith(".png")):
                    shutil.copyfile(home / p.step.name / name, home / name)
    peaks = [m.environment["peak_rss_bytes"] for m in manifests]
    report |= {
        "recipe": recipe.name,
        "fingerprint": _digest([p.fingerprint for p in plans]),
        "seconds": round(seconds, 3),
        "build_seconds": round(sum(m.seconds for m in manifests), 3),
        "peak_rss_bytes": max(peak_rss_bytes(), *peaks),
        "steps": rows,
        "pages": [
            str(home / p.step.name / PAGE)
            for p, manifest in zip(plans, manifests, strict=True)
            if PAGE in manifest.files and not (own and p.step.stage == REPORT_STAGE)
        ],
    }
    with _Named("report", home):
        write_json(home / ("report.json" if own else f"{recipe.name}-report.json"), report)
    return report
