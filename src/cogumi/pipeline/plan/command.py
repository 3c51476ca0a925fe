"""The result of `cogumi plan`: cost of training, sizes of the bundle, and whether they fit a budget (SPEC D1)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogumi.compress.gguf.planned_files import Weights
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.environment import beyond_memory
from cogumi.core.errors import RecipeError
from cogumi.core.estimate import Hardware
from cogumi.pipeline.plan import figures, recipe_plan
from cogumi.pipeline.plan.bundle_memory import Serving
from cogumi.pipeline.plan.recipe_plan import Plan
from cogumi.pipeline.plan.refusal import refusal
from cogumi.pipeline.plan.routes import Budget, RouteSearch
from cogumi.pipeline.plan.target import GGUF, look_up
from cogumi.pipeline.recipe import Recipe

if TYPE_CHECKING:
    from cogumi.evaluate.bench.run import Progress

Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]
"""Title, columns, rows."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `cogumi plan`; `bandwidth` None: measured on this machine if a budget is given."""

    budget: Budget = field(default_factory=Budget)
    serving: Serving = field(default_factory=Serving)
    bandwidth: int | None = None
    hardware: Hardware = field(default_factory=Hardware)
    length: int | None = None


@dataclass(frozen=True)
class Answer:
    """`training` is the plan of a recipe's steps, `sizes` that of its bundle or of a single model; either may be None.
    `measured` has the measurements of a GGUF file, or `unmeasured` the reason why there are none; `beside` the recipe's
    models outside the bundle, by step.
    """

    name: str
    training: Plan | None
    sizes: RouteSearch | None
    measured: dict[str, Any] | None = None
    beside: Mapping[str, Weights] = field(default_factory=dict)
    unmeasured: str = ""

    @property
    def title(self) -> str:
        """A short description of the planned recipe or model."""
        return f"recipe {self.name}: {len(self.training.steps)} steps" if self.training else f"model {self.name}"

    @cached_property
    def refused(self) -> bool:
        """Whether no route fits the budget."""
        return self.sizes is not None and self.sizes.fitting is None

    @cached_property
    def faults(self) -> list[str]:
        """Problems of the recipe, and the reason why no route fits the budget: one line each."""
        found = list(self.training.problems) if self.training else []
        return [*found, refusal(self.sizes)] if self.sizes and self.refused else found

    @property
    def problems(self) -> list[str]:
        """`faults`, and a line if the budget is missed without a change that makes it fit."""
        missed = self.sizes.route().missed if self.sizes and not self.refused else ()
        return [*self.faults, f"{self.name} does not fit: {', '.join(missed)}"] if missed else self.faults

    def document(self) -> dict[str, Any]:
        """All figures as a JSON-compatible dictionary."""
        found: dict[str, Any] = self.training.document() if self.training else {"recipe": self.name, "problems": []}
        sizes = figures.figures(self.sizes) if self.sizes else None
        beside = {name: weights.file.bytes for name, weights in self.beside.items()}
        return found | {"files_beside": beside, "problems": self.problems, "sizes": sizes, "measured": self.measured}

    def tables(self) -> list[Table]:
        """The same figures as tables."""
        found: list[Table] = []
        if self.training:
            found.append((f"recipe {self.name}", recipe_plan.COLUMNS, recipe_plan.table(self.training)))
        if self.sizes:
            found.append(("files", figures.FILE_COLUMNS, figures.file_table(self.sizes)))
        if self.beside:
            found.append(("files beside the bundle", figures.BESIDE_COLUMNS, figures.beside_table(self.beside)))
        if self.sizes:
            found.append(("memory when opened", ("", "bytes"), figures.memory_table(self.sizes)))
            found.append(figures.route_table(self.sizes))
        return found

    def remarks(self) -> list[str]:
        """The lines to show below the tables."""
        found = recipe_plan.remarks(self.training) if self.training else []
        found += figures.lines(self.sizes) if self.sizes else []
        found += [self.unmeasured] if self.unmeasured else []
        return [*found, figures.measurement_line(self.measured)] if self.measured else found


def answer_to(what: str, options: Options, progress: Callable[[], AbstractContextManager[Progress]]) -> Answer:
    """Plan a recipe or a model; a GGUF file is also measured, which reports its `progress`.

    Raises the errors of `target.look_up`, and `RecipeError` for a budget if the recipe makes no bundle.
    """
    target = look_up(what)
    found, parts = None, target if isinstance(target, Parts) else None
    beside: dict[str, Weights] = {}
    if isinstance(target, Recipe):
        found = recipe_plan.plan(target, options.hardware, options.length)
        if not found.problems:
            parts, beside = found.bundle, found.beside
        if parts is None and options.budget != Budget() and not found.problems:
            raise RecipeError(f"recipe {target.name} makes no bundle, so a budget cannot be checked; plan a model")
    if parts is None:
        return Answer(what, found, None, beside=beside)
    bandwidth = options.bandwidth or (figures.measured_bandwidth() if options.budget != Budget() else None)
    serving = replace(options.serving, context=min(options.serving.context, parts.base.shape.context))
    search = RouteSearch(parts, serving, options.budget, bandwidth)
    if Path(what).suffix != GGUF:
        return Answer(parts.name, found, search, beside=beside)
    if excess := beyond_memory(max(search.route().ram, Path(what).stat().st_size)):
        return Answer(parts.name, found, search, unmeasured=f"not measured: it {excess}")
    with progress() as shown:
        measured = figures.measured(Path(what), search, shown)
    if bandwidth is not None and options.bandwidth is None:
        bandwidth = 1e9 * measured["bandwidth_gb_s"]
    search = replace(search, bandwidth=bandwidth, reached=measured["share_of_ceiling"], measured=True)
    return Answer(parts.name, found, search, measured)
