"""Graded answers of all tiers to questions: the rows that gates are fitted to, in memory and on disk.

Of each split, `<split>.jsonl` has one JSON object per question, without the question itself; `<split>.safetensors` has
the hidden states of the base's answers (`hidden` [n, width], float32) in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.tiers import Question
from cogumi.confidence.gate import Calibration, Gate, with_probe
from cogumi.confidence.nets import Net
from cogumi.confidence.policy import Policy, PolicyAnswers
from cogumi.confidence.signals import abstains, answered_by, modifier_signals, same_text
from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_text
from cogumi.core.types import Example

Doubles = NDArray[np.float64]

COLUMNS = ("draft", "base", "modifier", "direct")
"""The order of `PolicyAnswers`' columns; a policy uses those of its tiers."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A tier's answer of `tokens` tokens and its verdict, with its signals (those of the base without the probe's).

    `hidden` is the state of the base's answer (see `Reply`); of other tiers it is empty.
    """

    text: str
    tokens: int
    correct: bool
    signals: Mapping[str, float]
    hidden: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Row:
    """One example with the reading of the question, the base's perplexity of it (`surprise`), and the answers.

    `routed` names the modifier that answered.
    """

    example: Example
    question: Question
    surprise: float
    draft: Answer | None
    base: Answer
    modifier: Answer | None
    routed: str = ""

    @property
    def direct_signals(self) -> dict[str, float]:
        """Signals for the gate of a modifier that answers first, without the base."""
        assert self.modifier is not None
        return {**self.modifier.signals, **self.question.signals, **answered_by(self.routed)}

    def modifier_signals(self, base_p: float) -> dict[str, float]:
        """Signals for the gate of a modifier that answers after the base; only for rows with a modifier's answer."""
        assert self.modifier is not None
        agree = same_text(self.modifier.text, self.base.text)
        return modifier_signals(self.direct_signals, self.base.signals, base_p, agree)


def write_rows(folder: Path, name: str, rows: Sequence[Row]) -> None:
    """Write rows as `<name>.jsonl` and `<name>.safetensors`, the former last, each atomically."""
    from safetensors.numpy import save_file

    states = np.array([row.base.hidden for row in rows], dtype=np.float32)
    partial = folder / f"{name}.safetensors.partial"
    save_file({"hidden": states}, partial)
    partial.replace(folder / f"{name}.safetensors")
    lines = [json.dumps(_stored(row), ensure_ascii=False) + "\n" for row in rows]
    write_text(folder / f"{name}.jsonl", "".join(lines))


def _stored(row: Row) -> dict[str, Any]:
    value = asdict(replace(row, base=replace(row.base, hidden=())))
    return {**value, "example": row.example.id}


def read_rows(folder: Path, name: str, examples: Sequence[Example]) -> list[Row]:
    """The rows that `write_rows` wrote, which answer the first of `examples` in order. Raises `ArtifactError`."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = folder / f"{name}.jsonl"
    try:
        values = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        states = load_file(folder / f"{name}.safetensors")["hidden"]
        pairs = zip(examples, values, states, strict=False)
        rows = [_restored(example, value, tuple(map(float, state))) for example, value, state in pairs]
        if not len(rows) == len(values) == len(states):
            raise ValueError(f"{len(values)} answers to {len(examples)} questions")
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ArtifactError(f"{path} holds no answers of tiers ({error}); build the `answers` step again") from error
    return rows


def _restored(example: Example, value: Mapping[str, Any], hidden: tuple[float, ...]) -> Row:
    if value["example"] != example.id:
        raise ValueError(f"an answer to {value['example']} stands where one to {example.id} belongs")
    draft, modifier = (Answer(**value[tier]) if value[tier] else None for tier in ("draft", "modifier"))
    base = Answer(**{**value["base"], "hidden": hidden})
    return Row(example, Question(**value["question"]), value["surprise"], draft, base, modifier, value["routed"])


def hidden(rows: Sequence[Row]) -> Doubles:
    """The hidden states of the base's answers [n, width]."""
    return np.array([r.base.hidden for r in rows])


def base_rows(rows: Sequence[Row], probe: Net | None) -> list[Mapping[str, float]]:
    """Signals for the base's gate, including the probe's logit."""
    return [with_probe(r.base.signals, probe, r.base.hidden) for r in rows]


def with_modifier(rows: Sequence[Row]) -> NDArray[np.intp]:
    """Indices of the rows with a modifier's answer."""
    return np.array([i for i, r in enumerate(rows) if r.modifier], dtype=np.intp)


def probabilities(rows: Sequence[Row], gates: Mapping[str, Gate], probe: Net | None) -> Doubles:
    """P(correct) from the gate of each column [n, 4]; NaN for a tier without a gate or an answer."""
    p = np.full((len(rows), len(COLUMNS)), np.nan)
    drafts = [r.draft for r in rows if r.draft]
    if drafts and "draft" in gates:
        p[:, 0] = gates["draft"].p_all([draft.signals for draft in drafts])
    if rows:
        p[:, 1] = gates["base"].p_all(base_rows(rows, probe))
    index = with_modifier(rows)
    if len(index) and "modifier" in gates:
        p[index, 2] = gates["modifier"].p_all([rows[i].modifier_signals(float(p[i, 1])) for i in index])
    if len(index) and "direct" in gates:
        p[index, 3] = gates["direct"].p_all([rows[i].direct_signals for i in index])
    return p


def policy_answers(
    rows: Sequence[Row], p: Doubles, policy: Policy, surprising: float, cost: Mapping[str, float]
) -> PolicyAnswers:
    """The answers of a policy's tiers to these rows; `cost` is the cost per token of `draft` and of `base`."""
    used = np.full(p.shape, np.nan)
    facts = np.zeros((*p.shape, 3))
    for i, row in enumerate(rows):
        answers = (row.draft, row.base, row.modifier, row.modifier)
        has_modifier = row.modifier is not None and not np.isnan(p[i, 2])
        for tier in policy.order(has_modifier, row.surprise > surprising):
            at = COLUMNS.index(tier)
            if (answer := answers[at]) is not None:
                used[i, at] = p[i, at]
                price = cost["draft" if tier == "draft" else "base"]
                facts[i, at] = answer.correct, not abstains(answer.text), price * answer.tokens
    return PolicyAnswers(used, facts[..., 0] > 0, facts[..., 1] > 0, facts[..., 2])


def familiar(rows: Sequence[Row], calibration: Calibration) -> NDArray[np.bool_]:
    """Whether each question is similar to the calibration data, i.e. not novel [n]."""
    return np.array([not calibration.question.novel(r.question.perplexity) for r in rows], dtype=bool)
