"""Stage `paths`: several distinct correct solutions of each hard training question (SPEC C12), for voting and training.

A model answers each question repeatedly, alternating between temperatures and adapters. Correct answers are kept; of
answers with the same form, the first. Two programs have the same form if they differ only in layout, comments or names
of variables; two tool calls if their JSON is equal; other answers if their texts are equal except for letter case,
white space and outer punctuation. Programs that pass their tests must also agree with the reference answer on new
inputs (`grading.differential_tests`): the few tests of a question pass many wrong programs, which would make up most of
the "distinct solutions".
"""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.registry import engine, nearest
from cogumi.core.stage import Context
from cogumi.core.text import normalise, strip_fences
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.data.solutions import Solutions, write_solutions
from cogumi.engine.protocol import replies
from cogumi.grading.differential_tests import differential_test
from cogumi.grading.graders import grade_all
from cogumi.grading.programs import programs
from cogumi.grading.sandbox import Program, run_all

VERSION = 2
KIND = "paths"
INPUTS = {"examples": "examples", "model": "model"}
OPTIONAL = {"adapter_*": "adapter"}
_ROLE = "adapter_"


class Config(BaseModel):
    """Answerable questions (of `domains`, if given) of at least difficulty `hard_from` or without a level are sampled,
    at most `rows`.

    A question gets up to `samples` answers, `per_round` at once, until it has `paths` solutions. Sample k has
    temperature `temperatures[k % n]`. Programs are compared with the reference answer on `probes` inputs; 0 relies on
    the question's tests.
    """

    model_config = ConfigDict(extra="forbid")
    hard_from: int = Field(4, ge=0, le=5)
    domains: tuple[str, ...] = ()
    rows: int | None = Field(None, ge=1)
    paths: int = Field(5, ge=1)
    samples: int = Field(16, ge=1)
    per_round: int = Field(4, ge=1)
    temperatures: tuple[float, ...] = Field((0.7, 1.0), min_length=1)
    probes: int = Field(40, ge=0)
    top_p: float = Field(0.95, gt=0, le=1)
    max_tokens: int = Field(64, ge=1)
    window: int = Field(512, ge=1, description="answers in flight")


class _Renamed(ast.NodeTransformer):
    """Renames the names that a program binds to numbers in order of appearance, and removes docstrings."""

    def __init__(self, bound: set[str]) -> None:
        self.bound = bound
        self.names: dict[str, str] = {}

    def _name(self, name: str) -> str:
        return self.names.setdefault(name, f"_{len(self.names)}") if name in self.bound else name

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._name(node.id), node.ctx)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        return ast.arg(self._name(node.arg))

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def program_form(code: str) -> str:
    """Canonical form of a Python program, without layout, comments, docstrings and names of variables.

    Raises `SyntaxError` or `ValueError` if it does not parse.
    """
    tree = ast.parse(code)
    bound = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    bound |= {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
    return ast.dump(_Renamed(bound).visit(tree))


def form(example: Example, output: str) -> str:
    """Canonical form of an answer; answers with equal forms are the same solution (see the module)."""
    kind = example.check["kind"]
    try:
        if kind == "code":
            with warnings.catch_warnings():  # generated code may contain questionable Python
                warnings.simplefilter("ignore", SyntaxWarning)
                return program_form(programs(output)[0])
        if kind == "tool_call":
            return json.dumps(json.loads(strip_fences(output)), sort_keys=True)
    except (SyntaxError, ValueError, RecursionError):
        pass  # compared as text
    return normalise(output)


@dataclass(slots=True)
class Samples:
    """Samples of a question: `counts` of each form, and the first text of each correct form."""

    example: Example
    counts: Counter[str] = field(default_factory=Counter)
    texts: dict[str, str] = field(default_factory=dict)
    overturned: int = 0

    @property
    def correct(self) -> int:
        """Number of correct samples."""
        return sum(self.counts[key] for key in self.texts)

    def add(self, text: str, correct: bool) -> None:
        """Count one sample."""
        key = form(self.example, text)
        self.counts[key] += 1
        if correct:
            self.texts.setdefault(key, text)

    def paths(self, most: int) -> tuple[str, ...]:
        """The correct texts, most frequent form first."""
        return tuple(self.texts[key] for key, _ in self.counts.most_common() if key in self.texts)[:most]

    @property
    def voted(self) -> bool:
        """Whether the most frequent form is correct."""
        return self.counts.most_common(1)[0][0] in self.texts


def request(example: Example, sample: int, adapters: Sequence[str], config: Config, seed: int) -> Request:
    """The request of a sample: its own seed, alternating temperatures and adapters."""
    digest = hashlib.sha256(f"{seed}/{example.id}/{sample}".encode()).digest()
    return Request(
        messages=example.messages,
        max_tokens=config.max_tokens,
        temperature=config.temperatures[sample % len(config.temperatures)],
        top_p=config.top_p,
        seed=int.from_bytes(digest[:4], "big"),
        adapter=adapters[sample // len(config.temperatures) % len(adapters)] if adapters else None,
    )


def hard_questions(examples: Sequence[Example], config: Config) -> list[Example]:
    """The questions to sample. Raises `DataError` for an unknown domain, or if there are none."""
    domains = sorted({e.domain for e in examples})
    for name in config.domains:
        if name not in domains:
            raise DataError(f"no training question of domain '{name}'; {nearest(name, domains)}")
    found = [
        e
        for e in examples
        if (not e.difficulty or e.difficulty >= config.hard_from)
        and e.domain in (config.domains or domains)
        and e.answerable
    ][: config.rows]
    if not found:
        raise DataError(f"every training question has a difficulty below {config.hard_from}; lower hard_from")
    return found


def _ask(model: Any, found: Sequence[Samples], config: Config, context: Context) -> None:
    """Sample in rounds; questions with enough solutions are left out."""
    for first in range(0, config.samples, config.per_round):
        numbers = range(first, min(first + config.per_round, config.samples))
        waiting = [(row, k) for row in found if len(row.texts) < config.paths for k in numbers]
        requests = [request(row.example, k, model.adapters, config, context.seed) for row, k in waiting]
        answers = list(_counted(replies(model, requests, config.window), len(requests), context))
        pairs = [(row.example, answer.text) for (row, _), answer in zip(waiting, answers, strict=True)]
        passed = [verdict.correct for verdict in grade_all(pairs)]
        right = agreeing(pairs, passed, config.probes)
        for (row, _), answer, tested, agreed in zip(waiting, answers, passed, right, strict=True):
            row.add(answer.text, agreed and answer.finish_reason == "stop")
            row.overturned += tested and not agreed


def agreeing(pairs: Sequence[tuple[Example, str]], passed: Sequence[bool], probes: int) -> list[bool]:
    """Which of the `passed` outputs also agree with the reference on `probes` new inputs, if they are programs."""
    tests: dict[int, list[Program]] = {}
    for i, ((example, output), good) in enumerate(zip(pairs, passed, strict=True)):
        if good and probes and example.check["kind"] == "code":
            found = [differential_test(example, code, probes) for code in programs(output)]
            tests[i] = [test for test in found if test]
    distinct = list(dict.fromkeys(test for several in tests.values() for test in several))
    agrees = dict(zip(distinct, (outcome.ok for outcome in run_all(distinct)), strict=True))
    return [good and (not tests.get(i) or any(agrees[test] for test in tests[i])) for i, good in enumerate(passed)]


def _counted(answers: Iterator[Reply], total: int, context: Context) -> Iterator[Reply]:
    for done, answer in enumerate(answers, 1):
        if done % 100 == 0 or done == total:
            context.progress(done, total, {})
        yield answer


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `model` and any number of `adapter_<name>` (PEFT folders) -> paths.jsonl."""
    torch.set_num_threads(context.threads)
    questions = hard_questions(read_examples(split_path(inputs["examples"].path, "train")), config)
    adapters = {role.removeprefix(_ROLE): a.path for role, a in inputs.items() if role.startswith(_ROLE)}
    found = [Samples(example) for example in questions]
    model = engine("torch")(inputs["model"].path, adapters=adapters)
    try:
        _ask(model, found, config, context)
    finally:
        model.close()
    kept = [Solutions(row.example.id, row.example.messages[-1].content, row.paths(config.paths)) for row in found]
    write_solutions(out, [row for row in kept if row.answers])
    by_domain = {name: [row for row in found if row.example.domain == name] for name in {e.domain for e in questions}}
    return {
        **_figures(found, config),
        "by_domain": {name: _figures(rows, config) for name, rows in sorted(by_domain.items())},
    }


def _figures(found: Sequence[Samples], config: Config) -> dict[str, float]:
    """`acceptance`: share of correct samples; `overturned`: share that passed the tests but disagreed with the
    reference; `distinctness`: forms per correct sample; `voted`: share of questions whose most frequent form is
    correct; `with_<n>`: number of questions with at least n solutions.
    """
    samples, correct = sum(row.counts.total() for row in found), sum(row.correct for row in found)
    counts = [len(row.paths(config.paths)) for row in found]
    return {
        "asked": len(found),
        "samples": samples,
        "acceptance": correct / samples,
        "overturned": sum(row.overturned for row in found) / samples,
        "paths": sum(counts),
        "distinctness": sum(len(row.texts) for row in found) / max(correct, 1),
        **{f"with_{n}": sum(count >= n for count in counts) for n in (1, 2, 3, 5)},
        "voted": sum(row.voted for row in found) / len(found),
    }
