"""Output of the command line: answers with their decisions, and tables of figures.

Results go to standard output, progress and messages to standard error, so that results can be piped.
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
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from cogumi.core.amounts import duration, share, size
from cogumi.core.types import Reply
from cogumi.data.examples import level_title
from cogumi.engine.presentation import verdict

if TYPE_CHECKING:
    from cogumi.cascade.memory.personal_offsets import PersonalRouting

LONG = 400  # `inspect` prints values up to this many characters in full
STDOUT = Console(highlight=False)
STDERR = Console(stderr=True, highlight=False)


def print_json(value: Any) -> None:
    """Print one JSON document."""
    print(json.dumps(value, indent=1, ensure_ascii=False), flush=True)


def confidence(reply: Reply) -> str:
    """One line: the tier that answered, P(correct), tokens, accepted drafts."""
    sure = "" if reply.p_correct is None else f" · P(correct) {reply.p_correct:.0%}"
    drafted = f" · drafts accepted {reply.usage.accepted}/{reply.usage.drafted}" if reply.usage.drafted else ""
    return f"{reply.tier or 'model'}{sure} · {reply.usage.completion_tokens} tokens{drafted}"


def print_verdict(reply: Reply) -> None:
    """Print the one line below an answer; in a terminal P(correct) is also a bar."""
    p = reply.p_correct if STDOUT.is_terminal else None
    bar = "" if p is None else f"{'█' * round(10 * p)}{'░' * (10 - round(10 * p))} "
    STDOUT.print(f"\n  [bold cyan]{bar}{escape(verdict(reply))}[/]")


def print_reasons(reply: Reply) -> None:
    """Print the lines below an answer: the tier, P(correct), and every decision."""
    STDOUT.print(f"\n  [bold cyan]{escape(confidence(reply))}[/]")
    for decision in reply.decisions:
        mark = "[green]✓[/]" if decision.accepted else "[yellow]→[/]"
        line = Text.from_markup(f"{mark} [dim]{escape(decision.tier)}: {escape(decision.reason)}[/]")
        STDOUT.print(Padding(line, (0, 0, 0, 2), expand=False))


def print_personal(found: PersonalRouting) -> None:
    """Print whether personal routing is on for a user, and its offsets."""
    STDOUT.print(f"personal routing of {escape(found.user)}: {'on' if found.on else 'off'}", soft_wrap=True)
    STDOUT.print(f"rated answers: {found.rated} (at least {found.needed} are needed)")
    for domain, offset in found.offsets.items():
        STDOUT.print(f"  {escape(domain)}: {offset:+.2f} on the logit of P(correct)", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table: the first column holds names, the others figures."""
    shown = Table(title=escape(title), title_justify="left", title_style="bold")
    for index, column in enumerate(columns):
        shown.add_column(escape(column), justify="right" if index else "left")
    for row in rows:
        shown.add_row(*(escape(cell) for cell in row))
    STDOUT.print(shown)


def print_accuracy(accuracy: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]], title: str) -> None:
    """Print `{tier: {domain: {difficulty: [correct, n]}}}` as tables: by tier and domain, by tier and difficulty."""
    domains = sorted({domain for tier in accuracy.values() for domain in tier})
    rows = [
        [tier, share(cell for row in cells.values() for cell in row.values())]
        + [share(cells.get(domain, {}).values()) for domain in domains]
        for tier, cells in accuracy.items()
    ]
    table(title, ["tier", "all", *domains], rows)
    if len({level for tier in accuracy.values() for cells in tier.values() for level in cells}) > 1:
        print_levels(accuracy)


def print_levels(accuracy: Mapping[str, Mapping[str, Mapping[str, Sequence[int]]]]) -> None:
    """Print `{tier: {domain: {level: [correct, n]}}}` by tier and level of difficulty."""
    levels = sorted({level for tier in accuracy.values() for cells in tier.values() for level in cells})
    rows = [
        [tier, *(share(pair for row in cells.values() for at, pair in row.items() if at == level) for level in levels)]
        for tier, cells in accuracy.items()
    ]
    table("The same by difficulty", ["tier", *map(level_title, levels)], rows)


def print_report(report: Mapping[str, Any]) -> None:
    """Print the figures of a build: accuracy by tier, then gate, speculation, routes, sizes and time."""
    if accuracy := report.get("accuracy"):
        print_accuracy(accuracy, "Correct answers to held-out questions")
    rows: list[tuple[str, str]] = []
    if gate := report.get("gate"):
        if given := gate.get("given"):
            rows.append(("answers given: AUROC of P(correct)", f"{given['auroc']:.3f}"))
            rows.append(("answers given: calibration error (ECE)", f"{given['ece']:.3f}"))
        rows += [
            ("base alone: AUROC of P(correct)", f"{gate['auroc']:.3f}"),
            ("base alone: AUROC of perplexity", f"{gate['auroc_perplexity']:.3f}"),
            ("base alone: calibration error (ECE)", f"{gate['ece']:.3f}"),
            ("accepted answers (coverage)", f"{gate['coverage']:.1%}"),
            (f"wrong among accepted (bound {gate['bound']:.0%})", f"{gate['accepted_error']:.1%}"),
        ]
        if not gate["accepted"]:
            rows[-1] = ("wrong among accepted", "-")
    if (unanswerable := report.get("unanswerable")) and unanswerable["n"]:
        confident, n = unanswerable["confident"], unanswerable["n"]
        rows.append(("unanswerable questions with an accepted answer", f"{confident} of {n}"))
    rows += [
        (f"modifier {domain}: before → after", f"{figures['before']:.1%} → {figures['after']:.1%}")
        for domain, figures in report.get("modifiers", {}).items()
    ]
    if speculation := report.get("speculation"):
        rows.append(("drafted tokens accepted", f"{speculation['acceptance']:.1%}"))
        rows.append(("speed-up with speculation forced on", f"{speculation['speedup']:.2f}x"))
    rows += [(f"route {route}", f"{part:.1%}") for route, part in report.get("routes", {}).items()]
    rows += [(f"bytes: {part}", size(count)) for part, count in report.get("bytes", {}).items()]
    rows.append(("all steps", duration(report["build_seconds"])))
    rows.append(("this run", duration(report["seconds"])))
    rows.append(("peak memory", size(report["peak_rss_bytes"])))
    table(f"Recipe {report['recipe']}", ["figure", "value"], rows)
    if gate and "promise" in gate:
        STDOUT.print(gate["promise"], markup=False)
    for page in report.get("pages", ()):
        STDOUT.print(f"figures: {page}", soft_wrap=True, markup=False)


def print_evaluation(figures: Mapping[str, Any]) -> None:
    """Print the figures of `evaluate.accuracy`, and the rows that could not be read, asked or graded."""
    every = {"all": {name: figures[name] for name in ("correct", "n", "interval")}, **figures["domains"]}
    rows = [
        [name, f"{row['correct']} of {row['n']}", share([[row["correct"], row["n"]]]), _interval(row["interval"])]
        for name, row in every.items()
    ]
    title = f"{figures['tier']}: {figures['n']} questions of {figures['data']}"
    table(title, ["domain", "correct", "share", "95% interval"], rows)
    levels = {str(level) for cells in figures["accuracy"].values() for level in cells}
    if len(levels) > 1:
        print_levels({figures["tier"]: figures["accuracy"]})
    if figures["accepted"] is not None:
        wrong = f", {figures['accepted_wrong']} of them wrong" if figures["accepted"] else ""
        STDOUT.print(f"accepted: {figures['accepted']} of {figures['n']} ({figures['coverage']:.1%}){wrong}")
    if figures["calibrated"]:
        order = "-" if figures["auroc"] is None else f"{figures['auroc']:.3f}"
        STDOUT.print(f"P(correct) of {figures['calibrated']} answers: AUROC {order}, ECE {figures['ece']:.3f}")
    else:
        STDOUT.print("P(correct): not calibrated")
    if figures["graders"]:
        chosen = ", ".join(f"{domain}: {kind}" for domain, kind in figures["graders"].items())
        STDOUT.print(f"graders chosen by the answers, because the rows name no check: {chosen}", soft_wrap=True)
    for what in ("rejected", "failed"):
        if found := figures[what]:
            reason = "could not be read" if what == "rejected" else "could not be asked or graded"
            STDERR.print(f"{len(found)} rows {reason}:")
            for row in found[:10]:
                STDERR.print(f"  {escape(row)}", soft_wrap=True)
    if "out" in figures:
        STDOUT.print(f"answers: {figures['out']}", soft_wrap=True, markup=False)


def _interval(bounds: Sequence[float]) -> str:
    return f"{bounds[0]:.1%} to {bounds[1]:.1%}"


def findings(name: str, found: Any) -> dict[str, Any]:
    """The results of a suite as JSON values."""
    rows = [asdict(figure) | {"met": figure.met} for figure in found.figures]
    return {"suite": name, "figures": rows, "facts": dict(found.facts), "pictures": [str(p) for p in found.pictures]}


def print_findings(found: Mapping[str, Any]) -> None:
    """Print the table of a suite, its facts, and the paths of its pictures."""
    rows = []
    for row in found["figures"]:
        mark = {True: "✓ ", False: "✗ ", None: ""}[row["met"]]
        bounds = "" if row["low"] is None else f"{row['low']:.4g} .. {row['high']:.4g}"
        value = "-" if row["value"] is None else f"{row['value']:.4g}"
        rows.append([row["name"], value, bounds, f"{mark}{row['goal']}", row["note"]])
    table(f"Suite {found['suite']}", ["figure", "value", "bounds", "goal", "note"], rows)
    for key, value in found["facts"].items():
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        STDOUT.print(f"[dim]{escape(key)}: {escape(text)}[/]", soft_wrap=True)
    for path in found["pictures"]:
        STDOUT.print(escape(path), soft_wrap=True)


def print_inspection(found: Mapping[str, Any]) -> None:
    """Print the result of `inspection.describe`: tables of files or steps, and every other value by name."""
    if found["what"] == "run":
        print_report(found)
        return
    for key, value in found.items():
        if key == "files":
            table("Files, verified", ["file", "size", "SHA-256"], _file_rows(value))
        elif key == "promises":
            for policy, line in value.items():
                STDOUT.print(f"[bold]{escape(policy)}[/]: {escape(line)}", soft_wrap=True)
        elif key == "steps":
            rows = [
                [s["name"], s["stage"], ", ".join(f"{r}={i}" for r, i in s.get("inputs", {}).items())] for s in value
            ]
            table("Steps", ["step", "stage", "inputs"], rows)
        elif value and key.endswith("bytes"):
            STDOUT.print(f"{key.removesuffix('bytes').replace('_', ' ')}size: {size(value)}")
        elif value:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            text = text if len(text) <= LONG else f"{len(value)} entries; --json shows them"
            STDOUT.print(f"[bold]{escape(key)}[/]: {escape(text)}", soft_wrap=True)


def _file_rows(files: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    return [[name, size(entry["bytes"]), entry["sha256"][:16]] for name, entry in files.items()]


def print_bench(found: Mapping[str, Any]) -> None:
    """Print the rows of a benchmark, their other values, and the rows that failed."""
    rows = [row for row in found["rows"] if row["ratio"] is not None]
    figures = []
    for row in rows:
        conditions = row["conditions"]
        mark = {True: "✓ ", False: "✗ ", None: ""}[conditions.get("met")]
        spread = " .. ".join(f"{end:.3g}" for end in conditions.get("spread", ()))
        values = f"{row['value']:.4g} / {row['baseline']:.4g} {row['unit']}"
        figures.append([row["name"], f"{row['ratio']:.3f}", spread, f"{mark}{conditions.get('goal', '')}", values])
    model = f"{found['model']} ({size(found['model_bytes'])}), {found['threads']} threads"
    title = f"{model}, memory {found['bandwidth_gb_s']:.1f} GB/s ({found['bandwidth_basis']})"
    if figures:
        columns = ["row", "ratio (median of pairs)", "spread of pairs", "goal", "with / without (median of each side)"]
        table(title, columns, figures)
    for row in rows:
        rest = {k: v for k, v in row["conditions"].items() if k not in ("goal", "met", "spread", "rounds")}
        text = ", ".join(f"{name} {json.dumps(value, ensure_ascii=False)}" for name, value in rest.items())
        STDOUT.print(f"[bold]{escape(row['name'])}[/] [dim]{escape(text)}[/]", soft_wrap=True)
    for row in found["rows"]:
        if row["ratio"] is None:
            STDOUT.print(f"[yellow]{escape(row['name'])}[/]: {escape(row['conditions']['error'])}", soft_wrap=True)


def print_question(question: str, why: str) -> None:
    """Print a showcase question and the behaviour it demonstrates."""
    STDOUT.print(f"\n[dim]{escape(why)}[/]\n[bold]> {escape(question)}[/]", soft_wrap=True)


def printable(text: str) -> str:
    """The text with its control characters, which could send commands to the terminal, replaced."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def print_serving(where: str, models: Iterable[str], page: str | None) -> None:
    """Print the address of the server, of its page, and an example request."""
    body = '{"model": "cogumi", "messages": [{"role": "user", "content": "What is 3 + 4?"}]}'
    STDOUT.print(f"cogumi: ready at {where}/v1 ({', '.join(models)}); Ctrl-C ends. Try:", soft_wrap=True)
    if page:
        STDOUT.print(f"  page: {page}", soft_wrap=True)
    STDOUT.print(f"  curl {where}/v1/chat/completions -H 'content-type: application/json' -d '{body}'", soft_wrap=True)


def print_next(bundle: Path) -> None:
    """Print the commands to try after the demo."""
    STDOUT.print(
        f"Next:\n  cogumi chat {bundle}       chat with it in the terminal\n"
        f"  cogumi ui {bundle}         chat with it in a browser\n"
        f"  cogumi serve {bundle}      serve it to any OpenAI client\n"
        f"  cogumi inspect {bundle}    show its contents\n"
        f"  {bundle.parent / 'report.md'}  all figures, with pictures",
        soft_wrap=True,
    )


def print_error(error: BaseException) -> None:
    """Print one line to standard error."""
    print(f"cogumi: {error}", file=sys.stderr)
