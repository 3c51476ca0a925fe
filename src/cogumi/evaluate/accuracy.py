"""Accuracy, confidence and accepted answers of an engine on a list of questions, for `cogumi eval`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cogumi.confidence.metrics import auroc, ece, wilson
from cogumi.core.errors import DataError, RequestError
from cogumi.core.text import last_user_message
from cogumi.core.types import Example, Reply, Request, Verdict
from cogumi.data.examples import level
from cogumi.engine.protocol import Engine, replies
from cogumi.grading.graders import grade, grade_all
from cogumi.grading.model_graders import NO_MODELS, Models
from cogumi.grading.suggest import check_of, suggested_grader


@dataclass(frozen=True, slots=True)
class Asked:
    """A question with its graded answer."""

    example: Example
    reply: Reply
    verdict: Verdict

    def row(self) -> dict[str, Any]:
        """The answer as a JSON object."""
        return {
            "question": last_user_message(self.example.messages),
            "answer": self.example.answer,
            "output": self.verdict.output,
            "correct": self.verdict.correct,
            "p_correct": self.reply.p_correct,
            "accepted": self.reply.accepted,
            "tier": self.reply.tier,
            "domain": self.example.domain,
            "grader": self.verdict.grader,
            "source": self.example.source,
        }


def with_checks(examples: Sequence[Example]) -> tuple[list[Example], dict[str, str]]:
    """The examples, with the suggested check where one has none, and the kind suggested for each domain.

    The answers of a domain whose rows have none decide, as for `adopt`; free text keeps the default `exact`.
    """
    answers: dict[str, list[str]] = {}
    for example in examples:
        if "check" not in example.meta:
            answers.setdefault(example.domain, []).append(example.answer)
    kinds = {domain: suggested_grader(found) or "exact" for domain, found in answers.items()}

    def checked(example: Example) -> Example:
        if "check" in example.meta:
            return example
        check = check_of(kinds[example.domain], example.answer, set(answers[example.domain]))
        return replace(example, meta=dict(example.meta) | {"check": check})

    return [checked(example) for example in examples], kinds


def ask(
    engine: Engine, requests: Sequence[Request], examples: Sequence[Example], models: Models = NO_MODELS
) -> tuple[list[Asked], list[str]]:
    """The graded answers of all questions that can be asked and graded, and a line for each other one.

    `models` are those that graders ask.
    """
    failed: list[str] = []
    usable: list[tuple[Request, Example]] = []
    for request, example in zip(requests, examples, strict=True):
        if problem := models.missing(example.check["kind"]):
            failed.append(f"{example.source}: {problem}")
            continue
        try:
            engine.check(request)
            usable.append((request, example))
        except RequestError as error:
            failed.append(f"{example.source}: {error}")
    answers = list(replies(engine, [request for request, _ in usable]))
    asked = [(example, reply) for (_, example), reply in zip(usable, answers, strict=True)]
    graded = []
    for (example, reply), verdict in zip(asked, _verdicts(asked, models), strict=True):
        if isinstance(verdict, Verdict):
            graded.append(Asked(example, reply, verdict))
        else:
            failed.append(f"{example.source}: {verdict}")
    return graded, failed


def _verdicts(asked: Sequence[tuple[Example, Reply]], models: Models) -> Iterator[Verdict | DataError]:
    """The verdict of each answer, or the error of a row that cannot be graded."""
    pairs = [(example, reply.text) for example, reply in asked]
    try:
        yield from grade_all(pairs, models)
    except DataError:
        for example, output in pairs:
            try:
                yield grade(example, output, models)
            except DataError as error:
                yield error


def figures(asked: Sequence[Asked]) -> dict[str, Any]:
    """Accuracy with 95% (Wilson) intervals, in all, by domain and as cells `{domain: {level: [correct, n]}}`; accepted
    answers and wrong ones among them; AUROC and ECE of P(correct).

    A figure is None if it cannot be measured: without answers, without P(correct), or without accepted answers.
    """
    right = [one.verdict.correct for one in asked]
    cells: dict[str, dict[str, list[int]]] = {}
    for one in asked:
        cell = cells.setdefault(one.example.domain, {}).setdefault(level(one.example), [0, 0])
        cell[0] += one.verdict.correct
        cell[1] += 1
    kept = [one.verdict.correct for one in asked if one.reply.accepted]
    known = [(one.reply.p_correct, one.verdict.correct) for one in asked if one.reply.p_correct is not None]
    p, of_known = [p for p, _ in known], [correct for _, correct in known]
    judged = any(one.reply.decisions for one in asked)
    domains = {}
    for domain, row in sorted(cells.items()):
        correct, n = (sum(cell[i] for cell in row.values()) for i in (0, 1))
        domains[domain] = {"correct": correct, "n": n, "interval": wilson(correct, n)}
    return {
        "n": len(asked),
        "correct": sum(right),
        "interval": wilson(sum(right), len(right)),
        "accuracy": cells,
        "domains": domains,
        "accepted": len(kept) if judged else None,
        "accepted_wrong": len(kept) - sum(kept) if judged else None,
        "coverage": len(kept) / len(asked) if judged else None,
        "accepted_error": 1 - sum(kept) / len(kept) if kept else None,
        "calibrated": len(known),
        "auroc": auroc(p, of_known) if len(set(of_known)) == 2 else None,
        "ece": ece(p, of_known) if known else None,
    }
