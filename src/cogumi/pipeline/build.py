"""Runs a recipe: each step in its own folder, once its inputs are finished; stops at a failed step or gate.

Finished steps are skipped. If a build is killed, the same command continues each interrupted stage from its checkpoint
(`step_folder`). The executor chooses the process that runs a step (`executors/`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from cogumi.core import artifact
from cogumi.core.environment import peak_rss_bytes, usable_threads
from cogumi.core.errors import CogumiError, GateError
from cogumi.core.files import exclusive_lock, write_json
from cogumi.core.registry import STAGES
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.pipeline import ranks, step_folder
from cogumi.pipeline.build_progress import Progress, Silent
from cogumi.pipeline.executor import Executor, Inputs, Task
from cogumi.pipeline.executors.in_process import InProcess
from cogumi.pipeline.executors.local import LocalProcesses
from cogumi.pipeline.failures import named
from cogumi.pipeline.fingerprint import PlannedStep, digest, plan
from cogumi.pipeline.graph import beside, width
from cogumi.pipeline.quality_gates import check_gate
from cogumi.pipeline.recipe import LOGS, Recipe

PAGE = "report.md"
UNFINISHED = "unfinished.json"
"""File in the folder of a build that was stopped or failed; the next complete build removes it."""
LOCK = ".lock"
"""File in the folder of a build that a running one locks."""
HEADROOM = 2
"""A step starts beside others only if this many times the largest memory of any step so far is available."""
PATIENCE = 3.0
"""Seconds to wait for the folder's lock: the processes of a build that was just killed need a moment to end."""


def build(
    recipe: Recipe,
    runs: Path,
    *,
    seed: int | None = None,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run the unfinished steps of a recipe in `runs/<recipe>`; write the report there and return it.

    Up to `jobs` steps run in parallel (None: as many as cores and recipe allow), each with its share of the threads.
    Raises `RecipeError` before anything runs, `GateError` at a failed gate, and errors of a stage with the name of its
    step. Finished steps are kept.
    """
    began = time.perf_counter()
    seed = recipe.seed if seed is None else seed
    plans = plan(recipe, seed)
    home = runs / recipe.folder
    most = _parallel(recipe, jobs)
    threads = threads_of(recipe, plans, most)
    if ranks.rank() > 0:
        return _help(plans, home, seed, recipe.root)
    with (
        _only_build(home) as lock,
        ranks.leading(home) as leader,
        closing(LocalProcesses(most, lock) if most > 1 else InProcess()) as executor,
    ):
        run = _Run(plans, threads, home, seed, recipe.root, executor, leader, progress or Silent())
        with _unfinished(recipe, home, run):
            run.to_the_end()
            return _report(recipe, plans, home, run.rows, time.perf_counter() - began)


@contextmanager
def _unfinished(recipe: Recipe, home: Path, run: _Run) -> Iterator[None]:
    """A file says that the build has not ended, and which step failed, because the report beside it is older."""
    path = home / (UNFINISHED if recipe.name == recipe.folder else f"{recipe.name}-{UNFINISHED}")
    write_json(path, {"recipe": recipe.name, "step": None, "error": "the build was stopped before its end"})
    try:
        yield
    except Exception as error:
        write_json(path, {"recipe": recipe.name, "step": run.failed, "error": str(error)})
        raise
    path.unlink()


def check_home(folder: Path) -> None:
    """`CogumiError` if a folder has files but is not that of a build, which replaces folders named like its steps."""
    if folder.exists() and not folder.is_dir():
        raise CogumiError(f"{folder} is a file; choose another folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / LOCK).exists():
        raise CogumiError(f"{folder} has files, but not those of a build, and would lose some; choose another folder")


@contextmanager
def _only_build(folder: Path) -> Iterator[int]:
    """Make the folder and lock it for this build; yields the lock's descriptor."""
    with ExitStack() as stack:
        try:
            check_home(folder)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / LOCK).touch()
            deadline = time.monotonic() + PATIENCE
            while True:
                try:
                    lock = stack.enter_context(exclusive_lock(folder / LOCK))
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.1)
        except BlockingIOError:
            raise CogumiError(f"another build is running in {folder}; wait for it or choose another folder") from None
        except OSError as error:
            raise CogumiError(f"{folder} cannot be written: {error.strerror}; choose another folder") from error
        yield lock


def _parallel(recipe: Recipe, jobs: int | None) -> int:
    """The number of steps that may run at a time: depends on recipe, machine and `jobs` only.

    With a GPU (by default) or in a launch of several processes, steps run one after another.
    """
    most = 1 if ranks.several() else min(width(recipe.graph), jobs or usable_threads())
    return 1 if most > 1 and jobs is None and _has_gpu() else most


def threads_of(recipe: Recipe, plans: Sequence[PlannedStep], most: int) -> dict[str, int]:
    """The threads of each step: all where only light steps may run beside it, else an equal share.

    Known before anything runs, because bytes depend on the number of threads.
    """
    everything, light = usable_threads(), {p.name for p in plans if p.light}
    share = max(1, everything // most)
    return {name: everything if others <= light else share for name, others in beside(recipe.graph).items()}


def _has_gpu() -> bool:
    try:
        from torch import cuda
    except ModuleNotFoundError:
        return False
    return cuda.is_available()


class _Run:
    """The steps of one build: finished, running and waiting."""

    def __init__(
        self,
        plans: list[PlannedStep],
        threads: Mapping[str, int],
        home: Path,
        seed: int,
        root: Path,
        executor: Executor,
        leader: ranks.Leader,
        progress: Progress,
    ) -> None:
        self._waiting = {p.name: p for p in plans}
        self._numbers = {p.name: number for number, p in enumerate(plans, 1)}
        self._running: dict[str, PlannedStep] = {}
        self._done: dict[str, Artifact] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._error: BaseException | None = None
        self.failed: str | None = None
        self._peak = peak_rss_bytes()
        self._threads, self._home, self._seed, self._root = threads, home, seed, root
        self._executor, self._leader, self._progress = executor, leader, progress

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The report's row for each step, in the order of the recipe."""
        return [self._rows[name] for name in self._numbers]

    def to_the_end(self) -> None:
        """Run all steps; raise the first error after the last running step has ended.

        After an error no further step starts. Running steps finish, because stopping them would lose all work since
        their last checkpoint. The error is shown at once, so that the user can interrupt them.
        """
        while self._waiting or self._running:
            while (p := self._next()) is not None:
                self._begin(p)
            if self._running:
                ended = self._executor.wait(self._progress)
                p = self._running.pop(ended.step)
                if ended.error is not None:
                    self._fail(p, ended.error)
                else:
                    self._finish(p, skipped=False)
            if self._error is not None and not self._running:
                raise self._error

    def _next(self) -> PlannedStep | None:
        """The first step in the recipe's order with finished inputs, if the executor has room; else None."""
        if self._error is not None or not self._executor.has_room(HEADROOM * self._peak):
            return None
        return next((p for p in self._waiting.values() if all(name in self._done for name in p.step.needs)), None)

    def _begin(self, p: PlannedStep) -> None:
        """Skip the step if it is finished, else pass it to the executor."""
        name, folder = p.name, self._home / p.name
        del self._waiting[name]
        try:
            with named(f"step '{name}'", folder):
                skipped, reason = step_folder.prepare(folder, p.fingerprint)
        except Exception as error:
            self._fail(p, error)
            return
        self._progress.started(name, p.step.stage, self._numbers[name], len(self._numbers), reason)
        if skipped:
            self._finish(p, skipped=True)
            return
        if p.trains:
            self._leader.train(name)
        self._running[name] = p
        inputs = {role: self._done[parent].path for role, parent in p.step.inputs.items()}
        logs = self._home / LOGS / name
        module, threads = STAGES[p.step.stage], self._threads[name]
        task = Task(name, threads, module, p.config, self._seed, self._root, inputs, folder, p.fingerprint, logs)
        self._executor.start(task)

    def _finish(self, p: PlannedStep, skipped: bool) -> None:
        """Record the results of a step and check its gates."""
        name, folder = p.name, self._home / p.name
        try:
            with named(f"step '{name}'", folder):
                step_folder.clean(folder)
                manifest, self._done[name] = artifact.read_manifest(folder), artifact.load(folder)
        except Exception as error:
            self._fail(p, error)
            return
        self._peak = max(self._peak, manifest.environment["peak_rss_bytes"])
        self._progress.finished(name, manifest.seconds, skipped, manifest.metrics)
        self._rows[name] = {
            "name": name,
            "stage": p.step.stage,
            "seconds": manifest.seconds,
            "skipped": skipped,
            "metrics": manifest.metrics,
        }
        try:
            for gate in p.step.gates:
                check_gate(name, gate, self._done)
        except GateError as error:
            self._fail(p, error)

    def _fail(self, p: PlannedStep, error: BaseException) -> None:
        """Keep the first error to raise it at the end; show an error at once if other steps are still running."""
        if self._running or self._error is not None:
            self._progress.failed(p.name, str(error), list(self._running))
        self._error, self.failed = self._error or error, self.failed or p.name


def _help(plans: list[PlannedStep], home: Path, seed: int, root: Path) -> dict[str, Any]:
    """Join the training steps of process 0, which alone writes artifacts; the report is empty."""
    by_name = {p.name: p for p in plans}
    context = Context(seed, usable_threads(), root, lambda done, total, figures: None)
    for name in ranks.steps_to_join(home):
        p = by_name[name]
        inputs = Inputs({role: artifact.load(home / parent) for role, parent in p.step.inputs.items()})
        with ranks.helping(home, name) as folder:
            p.stage.run(p.config, inputs, folder, context)
    return {}


def _report(
    recipe: Recipe, plans: list[PlannedStep], home: Path, rows: list[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """Write `report.json` with the metrics of the reporting step at top level; copy its page and pictures beside it.

    `seconds` is the duration of this build, `build_seconds` the sum over its steps. A recipe that extends another does
    not change that recipe's report; it writes `<recipe>-report.json`.
    """
    own = recipe.name == recipe.folder
    manifests = [artifact.read_manifest(home / p.name) for p in plans]
    report: dict[str, Any] = {}
    for p, manifest in zip(plans, manifests, strict=True):
        if p.reports:
            report |= manifest.metrics
            for name in manifest.files if own else ():
                if name == PAGE or ("/" not in name and name.endswith(".png")):
                    shutil.copyfile(home / p.name / name, home / name)
    peaks = [m.environment["peak_rss_bytes"] for m in manifests]
    report |= {
        "recipe": recipe.name,
        "fingerprint": digest([p.fingerprint for p in plans]),
        "seconds": round(seconds, 3),
        "build_seconds": round(sum(m.seconds for m in manifests), 3),
        "peak_rss_bytes": max(peak_rss_bytes(), *peaks),
        "steps": rows,
        "pages": [
            str(home / p.name / PAGE)
            for p, manifest in zip(plans, manifests, strict=True)
            if PAGE in manifest.files and not (own and p.reports)
        ],
    }
    with named("report", home):
        write_json(home / ("report.json" if own else f"{recipe.name}-report.json"), report)
    return report
