"""report.md: the figures of stage `report` as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cogumi.core.amounts import share
from cogumi.data.examples import level_title

Cells = Mapping[str, Mapping[str, Sequence[int]]]


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [_row(head), _row("---" for _ in head), *(_row(row) for row in rows), ""]


def _accuracy(accuracy: Mapping[str, Cells]) -> list[str]:
    domains = sorted({domain for cells in accuracy.values() for domain in cells})
    levels = sorted({level for cells in accuracy.values() for row in cells.values() for level in row})
    shown = levels if len(levels) > 1 else []
    rows = []
    for tier, cells in accuracy.items():
        by_domain = [share(cells.get(domain, {}).values()) for domain in domains]
        by_level = [share(pair for row in cells.values() for at, pair in row.items() if at == k) for k in shown]
        rows.append([tier, share(pair for row in cells.values() for pair in row.values()), *by_domain, *by_level])
    return _table(["tier", "all", *domains, *map(level_title, shown)], rows)


def _honesty(gate: Mapping[str, Any], refused: Mapping[str, Any]) -> list[str]:
    kinds = [
        [f"- {kind}{' (never seen before)' * (kind in refused['unseen_kinds'])}", f"{k} of {n}"]
        for kind, (k, n) in sorted(refused["kinds"].items())
    ]
    rows = [
        ["answers given, with P(correct)", f"{gate['given']['n']}"],
        ["AUROC of their P(correct)", f"{gate['given']['auroc']:.3f}"],
        ["their calibration error (ECE, ten bins)", f"{gate['given']['ece']:.3f}"],
        ["answers of the base alone", f"{gate['n']}"],
        ["calibration error (ECE, ten bins)", f"{gate['ece']:.3f}"],
        ["Brier score", f"{gate['brier']:.3f}"],
        ["AUROC of P(correct)", f"{gate['auroc']:.3f}"],
        ["AUROC of perplexity alone", f"{gate['auroc_perplexity']:.3f}"],
        ["AUROC of length alone", f"{gate['auroc_length']:.3f}"],
        ["accepted with confidence", f"{gate['coverage']:.1%} ({gate['accepted']})"],
        [
            f"wrong among accepted (asked: at most {gate['bound']:.0%})",
            f"{gate['accepted_error']:.1%}" if gate["accepted"] else "-",
        ],
    ]
    by_domain = [
        [
            name,
            f"{row['n']}",
            "-" if row["auroc"] is None else f"{row['auroc']:.3f}",
            f"{row['accepted'] / row['n']:.1%} ({row['accepted']})",
            f"{row['wrong']}",
        ]
        for name, row in gate["domains"].items()
    ]
    if refused["n"]:
        rows += [["unanswerable, yet answered with confidence", f"{refused['confident']} of {refused['n']}"], *kinds]
    return [
        "## Does it know what it knows?",
        "",
        *_table(["figure", "value"], rows),
        *_table(["domain", "questions", "AUROC, answers given", "accepted", "wrong among them"], by_domain),
        gate["promise"] + (f" Assumption: {gate['assumption']}." if gate["certified"] else ""),
        "",
        "![reliability](reliability.png) ![risk and coverage](risk.png)",
        "",
    ]


def _alone(alone: Mapping[str, Any], scores: Mapping[str, Any], price: Mapping[str, Any] | None) -> list[str]:
    """The base without the cascade, simpler scores of its answers, and what the cascade costs."""
    names = {"p_correct": "P(correct)", "likelihood": "perplexity alone", "length": "length alone"}
    names["p_true"] = "asked itself, P(True)"
    rows = [
        [names[name], f"{row['auroc']:.3f}", f"{row['ece']:.3f}" if "ece" in row else "-", f"{row['n']}"]
        for name, row in scores.items()
    ]
    asked = alone["unanswerable"]
    lines = ["## Against the base alone", "", *_table(["score of the base's answers", "AUROC", "ECE", "answers"], rows)]
    if asked["n"]:
        lines += [
            f"Of {asked['n']} unanswerable questions the base alone answers {asked['answered']}, as if it knew; the",
            f"cascade answers {asked['accepted_by_cascade']} with confidence.",
            "",
        ]
    if price:
        lines += [
            f"Price, on {price['n']} questions that the base answered alone: first token {price['first_token']:.2f}x,",
            f"whole answer {price['answer']:.2f}x, eight at a time {price['8_streams']:.2f}x the time of the base",
            "alone.",
            "",
        ]
    return lines


def _conversations(found: Mapping[str, Any] | None) -> list[str]:
    if not found:
        return []
    return [
        f"Follow-ups ({found['n']} questions after an answer): {found['accuracy']:.1%} right, ECE {found['ece']:.3f},",
        f"{found['accepted']} accepted, {found['wrong']} of them wrong.",
        "",
    ]


def _modifiers(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    rows = []
    for name, m in found.items():
        control = f"{m['control']:.1%}" if "control" in m else "-"
        rows.append([name, f"{m['before']:.1%}", f"{m['after']:.1%}", control, f"{m['n']}"])
    return [
        "## Did the modifiers help?",
        "",
        "On the answerable questions of their domain. Control: an adapter of the same shape and steps, trained on",
        "random questions of the domain.",
        "",
        *_table(["domain", "base", "modifier", "control", "questions"], rows),
    ]


def _speculation(found: Mapping[str, Any]) -> list[str]:
    rows = [
        ["drafted tokens accepted", f"{found['acceptance']:.1%}"],
        ["answers equal to plain ones, bit for bit", f"{found['identical']} of {found['n']}"],
        ["speed against plain", f"{found['speedup']:.2f}x"],
    ]
    return ["## Speculation, forced on for easy questions", "", *_table(["figure", "value"], rows)]


def page(figures: Mapping[str, Any]) -> str:
    """The report stage's metrics as one page of Markdown; pictures are expected beside it."""
    lines = [
        "# Results of this build",
        "",
        f"Measured on {figures['questions']:,} held-out questions that no earlier step has read. To an unanswerable",
        "question an abstention is the correct answer. The modifier row covers the domains that have one.",
        "",
        *_accuracy(figures["accuracy"]),
        "![accuracy by level](accuracy.png)",
        "",
        *_honesty(figures["gate"], figures["unanswerable"]),
        *_conversations(figures["conversations"]),
        *_alone(figures["alone"], figures["baselines"], figures["price"]),
        *(_modifiers(figures["modifiers"]) if figures["modifiers"] else ()),
        *_speculation(figures["speculation"]),
        "## Routes and sizes",
        "",
        *_table(["route", "share"], [[route, f"{part:.1%}"] for route, part in figures["routes"].items()]),
        *_table(["file", "bytes"], [[name, f"{count:,}"] for name, count in figures["bytes"].items()]),
    ]
    return "\n".join(lines) + "\n"
