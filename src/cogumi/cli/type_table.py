"""The table of a model's types, for `plan --types` and `adopt --type`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from cogumi.cli import console
from cogumi.cli.progress import BenchProgress
from cogumi.core.amounts import size
from cogumi.core.errors import CogumiError

if TYPE_CHECKING:
    from cogumi.evaluate.bench.type_comparison import Comparison, TypeFigures

FASTEST = "fastest"
COLUMNS = ("type", "file", "1 stream", "{streams} streams", "prompt", "loss", "right", "AUROC")


def plan_types(name: str, questions: int | None, limited: bool, check: bool, json: bool) -> None:
    """Measure and print the types of a model; with `check`, print only whether the disk has room for them.

    `limited`: options about a plan were given, which is refused.
    """
    from cogumi.core.model_files import locate_model
    from cogumi.evaluate.bench.type_comparison import TYPES, missing_room

    if limited:
        raise CogumiError("--types measures a model here, without limits; leave out --disk, --ram and the like")
    model = locate_model(name, Path())
    if check:
        if problem := missing_room(model, TYPES):
            console.STDERR.print(problem, soft_wrap=True, markup=False)
            raise SystemExit(1)
        console.STDOUT.print(f"types of {name}: the disk has room", soft_wrap=True, markup=False)
        return
    found = measured_types(model, None, questions)
    if json:
        console.print_json({"model": name, **found.document()})
    else:
        print_types(name, found)


def measured_types(model: Path, types: Sequence[str] | None, questions: int | None = None) -> Comparison:
    """Compare a model with the `types` (None: all that make sense), with a progress bar."""
    from cogumi.evaluate.bench.type_comparison import QUESTIONS, TYPES, compare

    with BenchProgress() as progress:
        return compare(model, TYPES if types is None else types, questions or QUESTIONS, progress)


def chosen_type(name: str, asked: str | None) -> tuple[str | None, Comparison | None]:
    """The type to requantize a model to (None: it stays as it is) and the measurement that shows what it costs.

    Raises `ExportError` for an unknown type, before anything is measured.
    """
    from cogumi.compress.gguf.type_mixture import check_type
    from cogumi.core.model_files import locate_model

    if asked is None:
        return None, None
    if asked != FASTEST:
        check_type(asked)
    found = measured_types(locate_model(name, Path()), None if asked == FASTEST else [asked])
    own = found.rows[0].type
    wanted = found.fastest.type if asked == FASTEST else asked
    return (None if wanted == own else wanted), found


def base_line(found: Comparison, type: str | None) -> str:
    """What the base of the bundle is."""
    own = found.rows[0].type
    if type is None:
        return f"base of the bundle: the file as it came ({own}), byte for byte"
    return f"base of the bundle: your file requantized from {own} to {type}; it is not your file byte for byte"


def print_types(name: str, found: Comparison) -> None:
    """Print the table, what its columns mean, types that the model cannot have, and the fastest one."""
    from cogumi.evaluate.bench.type_comparison import STREAMS, TOLERANCE, ratios

    own, best = found.rows[0], found.fastest
    title = f"{name}: tokens/s with {found.threads} threads, and answers to {own.n} questions"
    console.table(title, [c.format(streams=STREAMS) for c in COLUMNS], [_row(row, own) for row in found.rows])
    lines = [
        f"* {own.type} is the model as it came; the others are made from it, and removed again. Speeds: median of "
        f"{len(own.one)} rounds ± half their range.",
        "loss: nats per token of questions with their right answers; below the first row, the rise ± its standard "
        "error. AUROC: how well the mean log-probability tells right answers from wrong ones, ± its standard error.",
        *(row.note for row in found.rows if row.note),
    ]
    rule = f"of the types faster in every round, whose loss rises by at most {TOLERANCE} nats per token"
    if best is own:
        lines.append(f"fastest: {own.type}, as it came; there is none {rule}")
    else:
        lines.append(f"fastest: {best.type}, {median(ratios(best, own)):.2f}x at {STREAMS} streams, {rule}")
    for line in lines:
        console.STDOUT.print(line, soft_wrap=True, markup=False)


def _row(row: TypeFigures, own: TypeFigures) -> list[str]:
    mark = " *" if row is own else ""
    loss = f"{row.loss:.3f}" if row is own else f"{row.rise:+.3f} ±{row.rise_error:.3f}"
    area = "-" if row.auroc is None else f"{row.auroc:.2f} ±{row.auroc_error:.2f}"
    speeds = (_speed(rounds) for rounds in (row.one, row.many, row.prompt))
    return [f"{row.type}{mark}", size(row.bytes), *speeds, loss, f"{row.correct}/{row.n}", area]


def _speed(rounds: Sequence[float]) -> str:
    middle = median(rounds)
    return f"{middle:,.0f} ±{(max(rounds) - min(rounds)) / 2 / middle:.0%}"
