"""Commands `data ...`: what is in question files; chunks for outside review."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cogumi.cli import console
from cogumi.cli.options import (
    ColumnOption,
    FormOption,
    JsonOption,
    JudgeModelOption,
    JudgeOption,
    LayoutOption,
    chosen_reading,
)
from cogumi.cli.progress import RowProgress

if TYPE_CHECKING:
    from cogumi.data.sources.look import Look

app = typer.Typer(no_args_is_help=True, help="Question files: look at them, or divide them for outside review.")

REASONS = 5
LEAST = 0.005
"""Share of the rows from which a language is named."""


@app.callback()
def data() -> None:
    """Look at question files before a build; divide questions and outputs for outside review, and join the verdicts."""


@app.command()
def look(
    files: Annotated[
        list[Path], typer.Argument(help="Files, folders, quoted patterns, or ids such as hub:owner/name.")
    ],
    layout: LayoutOption = None,
    form: FormOption = None,
    column: ColumnOption = None,
    groups: Annotated[
        bool,
        typer.Option("--groups", help="Group questions by their meaning (sentence embeddings; some seconds a file)."),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="PNG file for a picture of lengths and rows.")] = None,
    json: JsonOption = False,
) -> None:
    """Show what question files hold: forms, rows, rejected rows and why, lengths, languages, repetitions, a grader.

    Nothing is changed. Files may be JSON Lines, JSON, CSV, TSV, Parquet, Arrow, text or Python, compressed by gzip or
    zstd, or in a tar or zip archive; `hub:owner/name/configuration/split` is a data set in the cache of `datasets`.
    docs/your-data.md lists the forms of rows.

    Example: `cogumi data look exam.csv --column question=Problem --column answer=Key`
    """
    from cogumi.data.sources.look import look as look_at
    from cogumi.data.sources.look import picture as draw

    reading = chosen_reading(layout, form, column)
    found: list[Look] = []
    for path in files:
        with RowProgress(f"reading {path.name}:") as bar:
            found.append(look_at(path, reading, bar.advanced))
    for one in found if groups else ():
        _group(one)
    if picture is not None:
        draw(picture, found)
    if json:
        console.print_json([one.to_json() for one in found])
        return
    rows = [
        [
            one.name,
            ", ".join(one.seen.forms) or "-",
            f"{one.rows:,}",
            f"{one.rejected:,}",
            f"{one.repeated:,}",
            f"{one.words(0, 0.5)} / {one.words(1, 0.5)}",
            one.grader or ("none: free text" if one.rows else "-"),
        ]
        for one in found
    ]
    columns = ["file", "form", "rows", "rejected", "repeated", "words q / a", "grader"]
    console.table("question files", columns, rows)
    for one in found:
        _print_details(one)


@app.command()
def split(
    examples: Annotated[Path, typer.Argument(help="JSON Lines of questions, such as heldout.jsonl of a build.")],
    outputs: Annotated[Path, typer.Argument(help="JSON Lines of outputs to them, line by line: `cogumi eval --out`.")],
    out: Annotated[Path, typer.Argument(help="New folder for the chunks.")],
    lines: Annotated[int | None, typer.Option(min=1, help="Lines of a chunk.", show_default="7")] = None,
    largest: Annotated[
        str | None,
        typer.Option("--largest", help="Largest size of a file, such as 25MB, instead of a number of lines."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Divide questions and outputs into chunks for outside review: chunk_001_test.jsonl, chunk_001_model.jsonl, ...

    Each line has an id. A reviewer returns chunk_001_verdict.jsonl with a line {"id": ..., ...} for each, in any order;
    `cogumi data join` brings them together.

    Example: `cogumi data split runs/mine/data/heldout.jsonl answers.jsonl review --largest 25MB`
    """
    from cogumi.core.amounts import parse_bytes
    from cogumi.data.review_chunks import split as divide

    if lines and largest:
        raise typer.BadParameter("give a number of lines or the largest size", param_hint="--lines, --largest")
    summary = divide(examples, outputs, out, lines, parse_bytes(largest) if largest else None)
    if json:
        console.print_json(summary)
        return
    rows = [[chunk["chunk"], f"{chunk['lines']:,}", chunk["ids"][0], chunk["ids"][-1]] for chunk in summary["chunks"]]
    console.table(f"{summary['lines']:,} lines in {out}", ["chunk", "lines", "first id", "last id"], rows)


@app.command()
def join(
    folder: Annotated[Path, typer.Argument(help="Folder of `cogumi data split`, with the verdicts in it.")],
    out: Annotated[Path, typer.Argument(help="New JSON Lines file: id, example, output and verdict of each line.")],
    strict: Annotated[bool, typer.Option("--strict", help="Refuse missing and foreign verdicts.")] = False,
    json: JsonOption = False,
) -> None:
    """Join the verdicts of outside reviewers with the questions and outputs, by id.

    Example: `cogumi data join review reviewed.jsonl --strict`
    """
    from json import dumps

    from cogumi.core.files import write_text
    from cogumi.data.review_chunks import join as bring_together

    found = bring_together(folder, strict)
    write_text(out, "".join(dumps(row, ensure_ascii=False) + "\n" for row in found.rows))
    figures = {"joined": len(found.rows), "missing": found.missing, "foreign": found.foreign}
    if json:
        console.print_json(figures)
        return
    counts = f"{len(found.missing):,} lines have none, {len(found.foreign):,} belong to no line"
    console.STDOUT.print(f"{out}: {len(found.rows):,} verdicts; {counts}", soft_wrap=True, markup=False)


@app.command()
def audit(
    answers: Annotated[
        Path, typer.Argument(help="Graded answers: `cogumi eval MODEL --data FILE --out answers.jsonl`.")
    ],
    by: Annotated[
        str,
        typer.Option(help="exact, short_answer, numeric, choice, f1, rouge_l, tool_call, similarity or judge."),
    ] = "f1",
    judge: JudgeOption = None,
    judge_model: JudgeModelOption = None,
    sample: Annotated[int, typer.Option(min=1, help="Answers that are graded again, at random.")] = 500,
    show: Annotated[int, typer.Option(min=0, help="Differences that are printed.")] = 10,
    seed: Annotated[int, typer.Option(help="Random seed of the sample.")] = 0,
    json: JsonOption = False,
) -> None:
    """Grade answers again by another method, and show where the verdicts differ, with both texts side by side.

    Example: `cogumi data audit answers.jsonl --by short_answer`, or with a model as the judge
    `cogumi data audit answers.jsonl --by judge --judge model.gguf`
    """
    from cogumi.evaluate.grading_models import grading_models
    from cogumi.evaluate.second_opinion import audit as second_opinion

    with grading_models(judge, judge_model) as models:
        found = second_opinion(answers, by, sample, seed, models).to_json()
    if json:
        console.print_json(found)
        return
    low, high = found["interval"]
    figures = [
        ("answers graded twice", f"{found['compared']:,}"),
        (f"cannot be graded by {by}", f"{found['skipped']:,}"),
        ("verdicts that differ", f"{found['differences']:,} ({found['share']:.1%}, 95% {low:.1%} to {high:.1%})"),
        (f"right only by {by}", f"{found['only_second_right']:,}"),
        (f"right, but not by {by}", f"{found['only_first_right']:,}"),
    ]
    console.table(f"second opinion by {by}", ["figure", "value"], figures)
    rows = [
        [
            str(row["line"]),
            row["grader"],
            "right" if row["correct"] else "wrong",
            _short(row["answer"]),
            _short(row["output"]),
        ]
        for row in found["rows"][:show]
    ]
    if rows:
        console.table("differences", ["line", "grader", "it said", "expected", "output"], rows)


def _short(text: str) -> str:
    """A text on one line of at most 30 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 30 else f"{line[:29]}…"


def _group(found: Look) -> None:
    """Group the questions of a path by meaning."""
    from cogumi.evaluate.suites.minilm import cached_embedder
    from cogumi.evaluate.suites.sentence_vectors import embed_all

    with RowProgress(f"embedding {found.name}:") as bar:
        encoder = cached_embedder()
        found.group(lambda texts: embed_all(encoder, texts, lambda done, total, figures: bar.advanced(done)))


def _print_details(found: Look) -> None:
    """The first question, languages, near-duplicates, reasons of rejected rows, and columns that are not used."""
    lines = []
    if found.example:
        said = [" ".join(text.split()) for text in (found.example.messages[-1].content, found.example.answer)]
        lines.append(f"first: {said[0][:90]} -> {said[1][:60]}")
    if found.languages:
        of = sum(found.languages.values())
        usual = [(name, count) for name, count in found.languages.items() if count >= LEAST * of]
        shares = ", ".join(f"{name} {count / of:.0%}" for name, count in usual)
        lines.append(f"languages of the first {of:,}: {shares}")
    if found.near_duplicates:
        lines.append(f"near-duplicates among the first {found.looked_at:,}: {found.near_duplicates:,}")
    lines += [f"group of {group.share:.0%}: {', '.join(group.words)}: {group.example[:60]}" for group in found.groups]
    for kind, count in found.reasons.most_common(REASONS):
        lines.append(
            f"rejected {count:,}: {found.first[kind].reason} ({Path(found.first[kind].file).name}:"
            f"{found.first[kind].line})"
        )
    if len(found.reasons) > REASONS:
        lines.append(f"and {len(found.reasons) - REASONS} other reasons: --json lists all")
    if found.reasons and not found.example:
        lines.append("name its columns with --column question=NAME --column answer=NAME")
    if found.seen.unused:
        lines.append(
            "not used: " + ", ".join(f"{name} ({count:,})" for name, count in found.seen.unused.most_common(8))
        )
    if lines:
        console.STDOUT.print(f"\n[bold]{found.name}[/]")
        for line in lines:
            console.STDOUT.print(f"  {line}", soft_wrap=True, markup=False)
