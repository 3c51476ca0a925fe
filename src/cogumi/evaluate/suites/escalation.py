"""Suite `escalation`: detection of dissatisfied follow-ups (SPEC F7), on synthetic and on rated dialogues.

Clean follow-ups come from held-out templates without spelling errors, none of which occurs in training. On dialogues
rated by people (`evaluate.suites.rated_dialogues`) the bundle's net is compared with a net of the same architecture
trained on half of these dialogues. Both are measured on the other half, with thresholds chosen on the first. 95% bounds
come from a bootstrap over dialogues or templates (Efron 1979), because turns of one dialogue are not independent.
"""

from __future__ import annotations

import re
import statistics
import tempfile
import timeit
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cogumi.cascade.dissatisfaction import FILE, MARKS, Escalation, describe, encode, last_turn, numbered
from cogumi.confidence.metrics import auroc
from cogumi.core.errors import CogumiError
from cogumi.core.pictures import legend_below, new_figure
from cogumi.core.types import Message
from cogumi.data.followups.dialogues import draw
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.evaluate.suites.rated_dialogues import RatedTurn, halves, read_rated
from cogumi.models.encoder import DEFAULT, load_encoder
from cogumi.models.followup_lstm import HIDDEN, WIDTH, FollowUpNet, export, word_vectors
from cogumi.train.fit_followup_net import best_threshold, fit

Doubles = NDArray[np.float64]
Truths = NDArray[np.bool_]

ROWS = 2000
"""Number of synthetic follow-ups."""

RESAMPLES = 500
DROPOUT, EPOCHS, RATE = 0.3, 4, 6e-3
"""Hyper-parameters of the net for rated dialogues; epochs and rate were chosen on a part of the training half."""

CUT_SHARE = 0.2
"""Share of the training half's dialogues that is used to choose the threshold instead of training."""

_COMPLAINT = re.compile(
    r"\b(no|not|nope|wrong|incorrect|again|instead|actually|mistake|useless|unfortunately|said|meant|rather|never|why|"
    r"bad|different|another|anything else|sure|change|don't|doesn't|can't)\b"
)
_REFUSAL = re.compile(
    r"\b(sorry|unfortunately|apolog\w+|unable|cannot|can't|could not|couldn't|afraid|no \w+ (found|match\w*))\b"
)


def run(task: Task) -> Findings:
    """Measure the bundle's `escalation.onnx`. Raises `CogumiError` without one, `DataError` for unusable data."""
    path = (task.bundle or Path()) / FILE
    if task.bundle is None or not path.is_file():
        raise CogumiError(f"the suite needs a bundle with {FILE}; name one whose recipe has the stage 'escalation'")
    net = Escalation(path)
    figures = [*_clean(net, task.seed), Figure("size, MB", path.stat().st_size / 1e6, "<= 3")]
    turn = draw("heldout", 2, task.seed)[1].messages
    seconds = timeit.repeat(lambda: net.dissatisfied(turn), number=20, repeat=20)
    long = (Message("user", "why? " * 20_000), Message("assistant", "so. " * 20_000), Message("user", "no! " * 20_000))
    worst = timeit.repeat(lambda: net.dissatisfied(long), number=1, repeat=10)
    figures.append(Figure("time per turn, ms", 1e3 * statistics.median(seconds) / 20, "< 3"))
    figures.append(Figure("time per turn of the longest texts, ms", 1e3 * statistics.median(worst), "< 3"))
    if task.data is None:
        return Findings(figures, {"rated dialogues": "none: name a file or folder of them as data"})
    rated, facts, pictures = _rated(net, task.data, task)
    return Findings([*figures, *rated], facts, pictures)


def _clean(net: Escalation, seed: int) -> list[Figure]:
    figures: list[Figure] = []
    for name, registers, goal in (("clean follow-ups", False, ">= 0.94"), ("the same, written in a hurry", True, "")):
        dialogues = draw("heldout", ROWS, seed, registers=registers)
        p = np.array([net.dissatisfied(d.messages) for d in dialogues])
        dissatisfied = np.array([d.dissatisfied for d in dialogues])
        right = (p >= net.threshold) == dissatisfied
        templates = np.unique([d.template for d in dialogues], return_inverse=True)[1]
        low, high = bounds(templates, partial(_share, right), seed)
        kinds = np.array([d.kind for d in dialogues])
        shares = sorted((float(np.mean(right[kinds == kind])), str(kind)) for kind in np.unique(kinds))
        weakest = ", ".join(f"{kind} {share:.2f}" for share, kind in shares[:3])
        note = f"accuracy; {templates.max() + 1} templates, none of them in training; weakest kinds: {weakest}"
        figures.append(Figure(name, float(np.mean(right)), goal, low, high, note))
        if not registers:
            acted = p >= net.sure
            figures.append(
                Figure("acted on, of the dissatisfied", float(acted[dissatisfied].mean()), note="where it is sure")
            )
            figures.append(Figure("acted on, of the others", float(acted[~dissatisfied].mean()), "<= 0.05"))
    return figures


def _share(right: Truths, rows: NDArray[np.int64]) -> float:
    return float(np.mean(right[rows]))


def _rated(net: Escalation, data: Path, task: Task) -> tuple[list[Figure], dict[str, object], list[Path]]:
    rated = read_rated(data)
    learning, judged = halves(rated, 0.5, task.seed)
    facts: dict[str, object] = {
        "dialogues": rated.dialogues,
        "rated turns": len(rated.turns),
        "malformed lines": rated.malformed,
        "user turns without rating or answer before": rated.left_out,
        "turns learned": len(learning),
        "turns judged": len(judged),
        "dissatisfied among them": float(np.mean([turn.dissatisfied for turn in judged])),
    }
    scores: dict[str, Callable[[RatedTurn], float]] = {
        "net of the bundle": lambda turn: net.dissatisfied(turn.messages),
        "keywords": keywords,
        "majority": lambda turn: 0.0,
    }
    with tempfile.TemporaryDirectory() as place:
        training, selection = _split(learning, task.seed)
        labels = {turn.dissatisfied for turn in training}
        if len(labels) == 2:
            fitted = learn(training, Path(place) / FILE, task)
            scores = {
                "net that learned from rated dialogues": lambda turn: fitted.dissatisfied(turn.messages),
                **scores,
            }
        else:
            facts["no net learned"] = "the learning half has turns of one kind only"
        figures, curves = [], {}
        for name, score in scores.items():
            found, p = _figures(name, score, selection or training, judged, task.seed)
            figures += found
            curves[name] = p
    dissatisfied = np.array([turn.dissatisfied for turn in judged])
    picture = task.out / "escalation.png" if task.out else None
    if picture:
        _picture(picture, dissatisfied, curves)
    return figures, facts, [picture] if picture else []


def _split(turns: Sequence[RatedTurn], seed: int) -> tuple[list[RatedTurn], list[RatedTurn]]:
    """Turns for training and, from other dialogues, turns for the choice of a threshold."""
    numbers = sorted({turn.dialogue for turn in turns})
    chosen = set(np.random.default_rng(seed).permutation(numbers)[: round(CUT_SHARE * len(numbers))].tolist())
    return [t for t in turns if t.dialogue not in chosen], [t for t in turns if t.dialogue in chosen]


def _figures(
    name: str,
    score: Callable[[RatedTurn], float],
    selection: Sequence[RatedTurn],
    judged: Sequence[RatedTurn],
    seed: int,
) -> tuple[list[Figure], Doubles]:
    """AUROC and F1 for dissatisfied turns, and the scores [judged]; F1's threshold is chosen on `selection`."""
    truth, groups = np.array([t.dissatisfied for t in judged]), np.array([t.dialogue for t in judged])
    p = np.array([score(turn) for turn in judged])
    labels = np.array([t.dissatisfied for t in selection])
    threshold = best_threshold(np.array([score(t) for t in selection]), labels, f1)
    predicted = p >= threshold if np.ptp(p) else np.zeros(len(p), dtype=bool)
    low, high = bounds(groups, lambda rows: auroc(p[rows], truth[rows]), seed)
    low_f1, high_f1 = bounds(groups, lambda rows: f1(truth[rows], predicted[rows]), seed)
    note = f"unseen dialogues; F1's threshold {threshold:.3f} from the learning half"
    return [
        Figure(f"AUROC, {name}", auroc(p, truth), "", low, high),
        Figure(f"F1, {name}", f1(truth, predicted), "", low_f1, high_f1, note),
    ], p


def _picture(path: Path, truth: Truths, curves: Mapping[str, Doubles]) -> None:
    """ROC curves of scores [rows]."""
    figure, axes = new_figure(1)
    for name, p in curves.items():
        thresholds = np.unique(np.quantile(np.append(p, np.inf), np.linspace(0, 1, 401), method="nearest"))[::-1]
        true_rate = [float(np.mean(p[truth] >= threshold)) for threshold in thresholds]
        false_rate = [float(np.mean(p[~truth] >= threshold)) for threshold in thresholds]
        axes[0].plot(false_rate, true_rate, label=f"{name}: {auroc(p, truth):.3f}")
    axes[0].set(xlabel="share of other turns called dissatisfied", ylabel="share of dissatisfied turns noticed")
    axes[0].set_title(f"Dissatisfied turns, AUROC in the legend ({len(truth)} turns)")
    legend_below(axes[0])
    figure.savefig(path)


def learn(turns: Sequence[RatedTurn], path: Path, task: Task) -> Escalation:
    """A net of the bundle's architecture trained on rated turns, exported to `path` and opened."""
    encoder, tokenizer = load_encoder(DEFAULT, Path())
    words, table, scale = word_vectors(encoder, tokenizer, WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(task.seed)
        net = FollowUpNet(table, scale, MARKS, HIDDEN, DROPOUT)
    numbers = numbered(words)
    labelled = [(last_turn(turn.messages), turn.dissatisfied) for turn in turns]
    rows = [encode(turn, numbers) for turn, _ in labelled if turn]
    labels = np.array([label for turn, label in labelled if turn], dtype=np.float32)

    def progress(done: int, total: int, loss: float) -> None:
        task.progress(done, total, {"loss": loss})

    fit(net, rows, labels, epochs=EPOCHS, lr=RATE, seed=task.seed, progress=progress)
    export(net, path, describe(words, 0.5, 0.5))
    return Escalation(path)


def keywords(turn: RatedTurn) -> float:
    """The baseline score: words of complaint in the user's turn, and of refusal in the answer before."""
    follow_up, answer = turn.messages[-1].content.lower(), turn.messages[-2].content.lower()
    return len(_COMPLAINT.findall(follow_up)) + 1.5 * bool(_REFUSAL.search(answer))


def f1(truth: Truths, predicted: Truths) -> float:
    """Harmonic mean of precision and recall; 0 without true positives."""
    right = float(np.sum(truth & predicted))
    return 2 * right / (float(truth.sum()) + float(predicted.sum())) if right else 0.0


def bounds(groups: NDArray[np.int64], figure: Callable[[NDArray[np.int64]], float], seed: int) -> tuple[float, float]:
    """95% bounds of figure(row numbers) by drawing groups [rows] with replacement."""
    rng = np.random.default_rng(seed)
    order = np.argsort(groups, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)
    draws = (rng.integers(len(members), size=len(members)) for _ in range(RESAMPLES))
    values = [figure(np.concatenate([members[i] for i in chosen])) for chosen in draws]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)
