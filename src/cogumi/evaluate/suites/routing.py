"""Suite `routing`: routing between a weak and a strong model from the question alone (SPEC F1, F5).

Public data: for every MMLU question, whether Mixtral-8x7B and GPT-4 were right (RouteLLM, Ong et al. 2024, one CSV
per subject). Routers are trained on part of the subjects and measured on the others, over several splits. Figures are
the AUROC of P(the weak model is right), and the share of strong-model calls that recovers a given part of the gap
between the models, as defined by RouteLLM:

    PGR(c) = (accuracy at share c of strong calls - weak accuracy) / (strong accuracy - weak accuracy)
    CPT(x) = least c with PGR(c) >= x;    APGR = mean of PGR over c in [0, 1]

evaluated at every threshold, while RouteLLM uses ten. Intervals resample subjects, because questions of a subject are
not independent.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.confidence.metrics import auroc
from cogumi.core.errors import CogumiError, DataError
from cogumi.core.pictures import legend_below, new_figure
from cogumi.engine.embedder import Embedder
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.evaluate.suites.fit_question_router import fit_question
from cogumi.evaluate.suites.minilm import cached_embedder
from cogumi.evaluate.suites.question_router import forecast, parts, question_input
from cogumi.evaluate.suites.sentence_vectors import embed_all

Doubles = NDArray[np.float64]
Flags = NDArray[np.bool_]

SPLITS = 5
UNSEEN = 0.4  # share of the subjects that a split holds out
DRAWS = 300  # resamples of subjects for the intervals
OURS, PLAIN, LENGTH, RANDOM = "question router", "logistic regression on embeddings", "length", "random"


@dataclass(frozen=True, slots=True, eq=False)
class Questions:
    """n questions with their subjects and the correctness of each model."""

    subjects: NDArray[np.str_]
    texts: Sequence[str]
    weak: Flags
    strong: Flags


def read_questions(folder: Path) -> Questions:
    """Read all `*.csv` of a folder: header `prompt,<weak>,<strong>`, then a row per question.

    Raises `DataError` for another format or fewer than ten subjects.
    """
    rows: list[tuple[str, str, bool, bool]] = []
    for path in sorted(folder.glob("*.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            if (header := next(lines, [])) and (len(header) != 3 or header[0] != "prompt"):
                raise DataError(f"{path}:1 must read 'prompt,<weak model>,<strong model>'; name RouteLLM's responses")
            for line in lines:
                if len(line) != 3 or not {line[1], line[2]} <= {"True", "False"}:
                    raise DataError(f"{path}:{lines.line_num} is not 'prompt,True|False,True|False'; correct the row")
                rows.append((path.stem.removeprefix("mmlu_"), line[0], line[1] == "True", line[2] == "True"))
    if len({subject for subject, *_ in rows}) < 10:
        raise DataError(f"{folder} holds fewer than ten subjects (*.csv); name the folder of RouteLLM's MMLU responses")
    subjects, texts, weak, strong = zip(*rows, strict=True)
    return Questions(np.array(subjects), texts, np.array(weak), np.array(strong))


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """Scores of one router for n unseen questions: `right` ranks by P(weak is right), `ask` by priority for the strong
    model.
    """

    right: Doubles
    ask: Mapping[str, Doubles]


def curve(ask: Doubles, weak: Flags, strong: Flags) -> Doubles:
    """PGR after 0, 1, ..., n strong calls [n + 1], in descending order of `ask` [n].

    Rows with equal `ask` count with their mean, because their order is arbitrary. NaN if both models have the same
    accuracy.
    """
    gain = np.asarray(strong, dtype=np.float64) - np.asarray(weak, dtype=np.float64)
    _, index, counts = np.unique(-ask, return_inverse=True, return_counts=True)
    level = np.bincount(index, weights=gain) / counts
    total = gain.sum()
    steps = np.concatenate([[0.0], np.cumsum(np.repeat(level, counts))])
    return np.asarray(steps / total) if total else np.full(len(steps), np.nan)


def apgr(pgr: Doubles) -> float:
    """Mean of a `curve` over the share of strong calls (trapezoids)."""
    return float(np.trapezoid(pgr, dx=1 / (len(pgr) - 1)))


def cpt(pgr: Doubles, part: float) -> float:
    """Least share of strong calls at which a `curve` reaches `part` of the gap; 1 if it never does."""
    reached = np.flatnonzero(pgr >= part - 1e-12)
    return float(reached[0]) / (len(pgr) - 1) if len(reached) else 1.0


def subject_splits(subjects: NDArray[np.str_], seed: int) -> list[Flags]:
    """`SPLITS` masks [n] of the questions with held-out subjects."""
    names, random = np.unique(subjects), np.random.default_rng(seed)
    size = round(UNSEEN * len(names))
    return [np.isin(subjects, random.permutation(names)[:size]) for _ in range(SPLITS)]


def plain(vectors: Doubles, weak: Flags, strong: Flags, unseen: Flags) -> Router:
    """The baseline: logistic regressions for `weak` and for `repaired` on embeddings of whole questions."""
    from sklearn.linear_model import LogisticRegression

    def probability(target: Flags) -> Doubles:
        line = LogisticRegression(max_iter=1000).fit(vectors[~unseen], target[~unseen])
        return np.asarray(line.predict_proba(vectors[unseen])[:, 1])

    right = probability(weak)
    return Router(right, {"wrong": -right, "repaired": probability(strong & ~weak)})


def ours(x: Doubles, data: Questions, unseen: Flags, seed: int) -> tuple[Router, float]:
    """The question router trained on the other subjects, and its regularisation."""
    seen = ~unseen
    net, strength = fit_question(x[seen], data.weak[seen], data.strong[seen], list(data.subjects[seen]), seed)
    predicted = forecast(net, x[unseen])
    asks = {"wrong": -predicted.weak_right, "repaired": predicted.repaired, "gain": predicted.gain}
    return Router(predicted.weak_right, asks), strength


def inputs(embedder: Embedder, texts: Sequence[str], progress: Callable[..., None]) -> tuple[Doubles, Doubles]:
    """Whole questions' vectors [n, width] and the question router's inputs [n, in]."""
    split = [parts(text) for text in texts]
    vectors = embed_all(embedder, [*texts, *(part for row in split for part in row)], progress)
    whole, rest = np.split(vectors, [len(texts)])
    pieces = np.split(rest, np.cumsum([len(row) for row in split])[:-1])
    return np.asarray(whole, dtype=np.float64), np.array(
        [question_input(text, piece) for text, piece in zip(texts, pieces, strict=True)]
    )


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """The held-out questions of one split and the scores of each router."""

    subjects: NDArray[np.str_]
    weak: Flags
    strong: Flags
    routers: Mapping[str, Router]

    def of(self, rows: NDArray[np.int64]) -> dict[str, float]:
        """All figures on a sample of the rows (with repeats)."""
        weak, strong = self.weak[rows], self.strong[rows]
        found = {}
        for name, router in self.routers.items():
            found[f"AUROC, {name}"] = auroc(router.right[rows], weak)
            for form, ask in router.ask.items():
                pgr = curve(ask[rows], weak, strong)
                found[f"APGR, {name}, {form}"] = apgr(pgr)
                found[f"CPT(50%), {name}, {form}"] = cpt(pgr, 0.5)
                found[f"CPT(80%), {name}, {form}"] = cpt(pgr, 0.8)
        found["AUROC gained over plain"] = found[f"AUROC, {OURS}"] - found[f"AUROC, {PLAIN}"]
        found["APGR gained by gain over wrong"] = found[f"APGR, {OURS}, gain"] - found[f"APGR, {OURS}, wrong"]
        return found


def intervals(splits: Sequence[Split], names: NDArray[np.str_], seed: int) -> dict[str, tuple[float, float]]:
    """95% bounds of every figure's mean over splits, by drawing subjects with replacement, equally for all splits."""
    random = np.random.default_rng(seed)
    of = [[np.flatnonzero(split.subjects == name) for name in names] for split in splits]
    means: dict[str, list[float]] = {}
    for _ in range(DRAWS):
        drawn = random.integers(len(names), size=len(names))
        rows = [np.concatenate([by_subject[i] for i in drawn]) for by_subject in of]
        found = [split.of(chosen) for split, chosen in zip(splits, rows, strict=True) if len(chosen)]
        for name in found[0]:
            means.setdefault(name, []).append(float(np.mean([one[name] for one in found])))
    bounds = {name: np.nanquantile(values, (0.025, 0.975)) for name, values in means.items()}
    return {name: (float(low), float(high)) for name, (low, high) in bounds.items()}


GOALS = {"AUROC gained over plain": "> 0", "APGR gained by gain over wrong": "> 0"}


def run(task: Task) -> Findings:
    """Train and measure on `task.data`. Raises `CogumiError` without data, `DataError` for another format."""
    if task.data is None:
        raise CogumiError(
            "the suite 'routing' needs --data: a folder of RouteLLM's MMLU responses, one CSV per subject"
        )
    data = read_questions(task.data)
    vectors, x = inputs(cached_embedder(), data.texts, task.progress)
    random = np.random.default_rng(task.seed).random(len(data.texts))
    short = -np.array([len(text) for text in data.texts], dtype=np.float64)
    splits, strengths = [], []
    for unseen in subject_splits(data.subjects, task.seed):
        mine, strength = ours(x, data, unseen, task.seed)
        strengths.append(strength)
        routers = {
            OURS: mine,
            PLAIN: plain(vectors, data.weak, data.strong, unseen),
            LENGTH: Router(short[unseen], {"wrong": -short[unseen]}),
            RANDOM: Router(random[unseen], {"wrong": -random[unseen]}),
        }
        splits.append(Split(data.subjects[unseen], data.weak[unseen], data.strong[unseen], routers))
    found = [split.of(np.arange(len(split.weak))) for split in splits]
    bounds = intervals(splits, np.unique(data.subjects), task.seed)
    figures = []
    for name in found[0]:
        values = [one[name] for one in found]
        spread = f"over splits {min(values):.3f} to {max(values):.3f}"
        figures.append(Figure(name, float(np.mean(values)), GOALS.get(name, ""), *bounds[name], spread))
    facts = {
        "questions": len(data.texts),
        "subjects": len(np.unique(data.subjects)),
        "splits": SPLITS,
        "unseen share of subjects": UNSEEN,
        "weak right": float(data.weak.mean()),
        "strong right": float(data.strong.mean()),
        "regularisation chosen inside the training subjects": strengths,
    }
    pictures = [task.out / "routing.png"] if task.out else []
    for path in pictures:
        _picture(path, splits)
    return Findings(figures, facts, pictures)


def _picture(path: Path, splits: Sequence[Split]) -> None:
    """Accuracy against the share of strong calls, mean over splits."""
    share = np.linspace(0, 1, 201)
    figure, axes = new_figure(height=5.0)

    def line(label: str, asks: Sequence[Doubles], **style: str) -> None:
        accuracy = np.zeros(len(share))
        for split, ask in zip(splits, asks, strict=True):
            pgr = curve(ask, split.weak, split.strong)
            gap = split.strong.mean() - split.weak.mean()
            accuracy += split.weak.mean() + gap * np.interp(share, np.linspace(0, 1, len(pgr)), pgr)
        axes[0].plot(share, accuracy / len(splits), label=label, **style)

    line("best possible", [s.strong.astype(float) - s.weak for s in splits], color="0.6", linestyle=":")
    line(f"{OURS}: gain", [s.routers[OURS].ask["gain"] for s in splits])
    for name in (OURS, PLAIN, LENGTH, RANDOM):
        line(f"{name}: weak wrong", [s.routers[name].ask["wrong"] for s in splits])
    axes[0].set(xlabel="share of strong calls", ylabel="share right, unseen subjects", xlim=(0, 1))
    axes[0].set_title(f"Accuracy by strong calls (mean of {len(splits)} splits)")
    legend_below(axes[0])
    figure.savefig(path)
