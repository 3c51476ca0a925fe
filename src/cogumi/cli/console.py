"""What the command line prints: answers with their reasons, and tables of figures.

Results go to standard output, progress and notes to standard error, so that output can be piped.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cogumi.core.amounts import duration, share, size
from cogumi.core.types import Reply

if TYPE_CHECKING:
    from cogumi.cascade.memory.personal_offsets import PersonalRouting

LONG = 400  # characters of a value that `inspect` still prints in full
OUT = Console(highlight=False)
NOTES = Console(stderr=True, highlight=False)


def emit(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)


def confidence(reply: Reply) -> str:
    """Who answered and how sure it is, in one line."""
    sure = "" if reply.p_correct is None else f" · P(correct) {reply.p_correct:.0%}"
    drafted = f" · drafts kept {reply.usage.accepted}/{reply.usage.drafted}" if reply.usage.drafted else ""
    return f"{reply.tier or 'model'}{sure} · {reply.usage.completion_tokens} tokens{drafted}"


def print_reasons(reply: Reply) -> None:
    """Under an answer: the tier, P(correct), and one line for every decision."""
    OUT.print(f"\n  [bold cyan]{escape(confidence(reply))}[/]", soft_wrap=True)
    for decision in reply.decisions:
        mark = "[green]✓[/]" if decision.accepted else "[yellow]→[/]"
        OUT.print(f"  {mark} [dim]{escape(decision.tier)}: {escape(decision.reason)}[/]", soft_wrap=True)


def print_personal(found: PersonalRouting) -> None:
    """Whether a user has personal routing, and what it does."""
    OUT.print(f"personal routing of {escape(found.user)}: {'on' if found.on else 'off'}", soft_wrap=True)
    OUT.print(f"rated answers: {found.rated} (offsets begin with {found.needed})")
    for domain, offset in found.offsets.items():
        OUT.print(f"  {escape(domain)}: {offset:+.2f} on the logit of P(correct)", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table: the first column names things, the others are figures."""
    shown = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(escape(column), justify="right" if index else "left")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    OUT.print(shown)


def print_accuracy(accuracy: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]], title: str) -> None:
    """`{tier: {domain: {difficulty: [correct, n]}}}` as two tables: tiers against domains, tiers against levels."""
    domains = sorted({domain for tier in accuracy.values() for domain in tier})
    levels = sorted({str(level) for tier in accuracy.values() for cells in tier.values() for level in cells})

    def by_level(cells: Mapping[str, Mapping[str, Sequence[int]]], level: str) -> str:
        return share(cell for row in cells.values() for at, cell in row.items() if str(at) == level)

    rows = [
        [tier, share(cell for row in cells.values() for cell in row.values())]
        + [share(cells.get(domain, {}).values()) for domain in domains]
        for tier, cells in accuracy.items()
    ]
    table(title, ["tier", "all", *domains], rows)
    if len(levels) > 1:
        names = ["no answer" if level == "0" else f"level {level}" for level in levels]
        rows = [[tier, *(by_level(cells, level) for level in levels)] for tier, cells in accuracy.items()]
        table("The same by difficulty", ["tier", *names], rows)


def print_report(report: Mapping[str, Any]) -> None:
    """The figures of a build: accuracy by tier, then what the gate, the drafts and the sizes came to."""
    if accuracy := report.get("accuracy"):
        print_accuracy(accuracy, "Answered correctly, held-out questions")
    rows: list[tuple[str, str]] = []
    if gate := report.get("gate"):
        rows += [
            ("tells right from wrong (AUROC)", f"{gate['auroc']:.3f}"),
            ("  from perplexity alone", f"{gate['auroc_perplexity']:.3f}"),
            ("calibration error (ECE)", f"{gate['ece']:.3f}"),
            ("answers accepted (coverage)", f"{gate['coverage']:.1%}"),
            (f"wrong among accepted (bound {gate['bound']:.0%})", f"{gate['accepted_error']:.1%}"),
        ]
    if unanswerable := report.get("unanswerable"):
        confident, n = unanswerable["confident"], unanswerable["n"]
        rows.append(("unanswerable, yet answered with confidence", f"{confident} of {n}"))
    rows += [
        (f"modifier {domain}: before → after", f"{figures['before']:.1%} → {figures['after']:.1%}")
        for domain, figures in report.get("modifiers", {}).items()
    ]
    if speculation := report.get("speculation"):
        rows.append(("drafted tokens kept", f"{speculation['acceptance']:.1%}"))
        rows.append(("speed with drafts forced on", f"{speculation['speedup']:.2f}x"))
    rows += [(f"route {route}", f"{part:.1%}") for route, part in report.get("routes", {}).items()]
    rows += [(f"bytes: {part}", size(count)) for part, count in report.get("bytes", {}).items()]
    rows.append(("time of this build", duration(report["seconds"])))
    rows.append(("peak memory", size(report["peak_rss_bytes"])))
    table(f"Recipe {report['recipe']}", ["figure", "value"], rows)
    for page in report.get("pages", ()):
        OUT.print(f"figures: {page}", soft_wrap=True, markup=False)


def print_evaluation(figures: Mapping[str, Any]) -> None:
    """What `evaluate.accuracy` found, and the rows of the file that could not be used."""
    print_accuracy({figures["tier"]: figures["accuracy"]}, f"{figures['n']} questions of {figures['data']}")
    if figures["coverage"] is not None:
        wrong = "-" if figures["accepted_error"] is None else f"{figures['accepted_error']:.1%}"
        OUT.print(f"accepted with confidence: {figures['coverage']:.1%}, wrong among those: {wrong}")
    if rejected := figures["rejected"]:
        NOTES.print(f"{len(rejected)} rows could not be used:")
        for row in rejected[:10]:
            NOTES.print(f"  {escape(row)}", soft_wrap=True)


def findings(name: str, found: Any) -> dict[str, Any]:
    """A suite's findings as JSON values."""
    rows = [asdict(figure) | {"met": figure.met} for figure in found.figures]
    return {"suite": name, "figures": rows, "facts": dict(found.facts), "pictures": [str(p) for p in found.pictures]}


def print_findings(found: Mapping[str, Any]) -> None:
    """The table of a suite, what it rests on, and where its pictures are."""
    rows = []
    for row in found["figures"]:
        mark = {True: "✓ ", False: "✗ ", None: ""}[row["met"]]
        bounds = "" if row["low"] is None else f"{row['low']:.4g} .. {row['high']:.4g}"
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        rows.append([row["name"], value, bounds, f"{mark}{row['goal']}", row["note"]])
    table(f"Suite {found['suite']}", ["figure", "value", "bounds", "goal", "note"], rows)
    for key, value in found["facts"].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        OUT.print(f"[dim]{escape(key)}: {escape(text)}[/]", soft_wrap=True)
    for path in found["pictures"]:
        OUT.print(escape(path), soft_wrap=True)


def print_inspection(found: Mapping[str, Any]) -> None:
    """What `inspection.look` found: a table of files or steps, and every other value by name."""
    if found["what"] == "run":
        print_report(found)
        return
    for key, value in found.items():
        if key == "files":
            table("Files, verified", ["file", "size", "SHA-256"], _file_rows(value))
        elif key == "steps":
            rows = [
                [s["name"], s["stage"], ", ".join(f"{r}={i}" for r, i in s.get("inputs", {}).items())] for s in value
            ]
            table("Steps", ["step", "stage", "inputs"], rows)
        elif value and key.endswith("bytes"):
            OUT.print(f"{key.removesuffix('bytes').replace('_', ' ')}size: {size(value)}")
        elif value:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text = text if len(text) <= LONG else f"{len(value)} entries; --json shows them"
            OUT.print(f"[bold]{escape(key)}[/]: {escape(text)}", soft_wrap=True)


def _file_rows(files: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [[name, size(entry["bytes"]), entry["sha256"][:16]] for name, entry in files.items()]


def print_bench(found: Mapping[str, Any]) -> None:
    """The rows of a benchmark, what else they tell, and what could not be measured."""
    rows = [row for row in found["rows"] if row["ratio"] is not None]
    figures = []
    for row in rows:
        told = row["conditions"]
        mark = {True: "✓ ", False: "✗ ", None: ""}[told.get("met")]
        spread = " .. ".join(f"{end:.3g}" for end in told.get("spread", ()))
        values = f"{row['value']:.4g} / {row['baseline']:.4g} {row['unit']}"
        figures.append([row["name"], f"{row['ratio']:.3f}", spread, f"{mark}{told.get('goal', '')}", values])
    model = f"{found['model']} ({size(found['model_bytes'])}), {found['threads']} threads"
    title = f"{model}, memory {found['bandwidth_gb_s']:.1f} GB/s"
    if figures:
        table(title, ["row", "ratio", "spread", "goal", "with / without"], figures)
    for row in rows:
        rest = {k: v for k, v in row["conditions"].items() if k not in ("goal", "met", "spread", "rounds")}
        text = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in rest.items())
        OUT.print(f"[bold]{escape(row['name'])}[/] [dim]{escape(text)}[/]", soft_wrap=True)
    for row in found["rows"]:
        if row["ratio"] is None:
            OUT.print(f"[yellow]{escape(row['name'])}[/]: {escape(row['conditions']['error'])}", soft_wrap=True)


def print_question(question: str, why: str) -> None:
    """A showcase question and what it is there to show."""
    OUT.print(f"\n[dim]{escape(why)}[/]\n[bold]> {escape(question)}[/]", soft_wrap=True)


def stream(piece: str) -> None:
    """Write a piece of an answer as it comes; control characters, which could steer a terminal, are replaced."""
    print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in piece), end="", flush=True)


def print_serving(where: str, models: Sequence[str]) -> None:
    """Where the server is and how to ask it."""
    body = '{"model": "cogumi", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}'
    OUT.print(f"cogumi: ready at {where}/v1 ({', '.join(models)}); Ctrl-C ends. Try:", soft_wrap=True)
    OUT.print(f"  curl {where}/v1/chat/completions -H 'content-type: application/json' -d '{body}'", soft_wrap=True)


def print_next(bundle: Path) -> None:
    """What to type after the demo."""
    OUT.print(
        f"Next:\n  cogumi chat {bundle}       talk to it (it was trained on single questions: /new before the next)\n"
        f"  cogumi serve {bundle}      any OpenAI client can use it\n"
        f"  cogumi inspect {bundle}    what is inside\n"
        f"  {bundle.parent / 'report.md'}  all figures, with pictures",
        soft_wrap=True,
    )


def print_error(error: BaseException) -> None:
    """One line on standard error."""
    print(f"cogumi: {error}", file=sys.stderr)
