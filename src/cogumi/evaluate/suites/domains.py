"""Suite `domains`: accuracy of domain routers on real questions, and detection of out-of-scope ones (SPEC F5, F6).

Two routers are measured. The first is trained here, on sentence embeddings and surface features of real questions from
four data sets (grade-school maths, Python tasks, exam questions, requests for a function call), and measured on files
and subjects outside its training data. It has a further class `other`, trained on other data sets; at run time the base
answers these. Out-of-scope detection is measured on data sets that are in none of its classes.

The second is the bundle's router, which reads the draft's hidden states. It is measured on new questions of its world
and on the real questions, all of which are out of scope for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from cogumi.bundle.format import open_bundle
from cogumi.cascade.tiers import router_input
from cogumi.confidence.domain_router import confidences, preload, scope_for
from cogumi.confidence.nets import Net, load_net, load_scope
from cogumi.core.errors import CogumiError, ContextError
from cogumi.core.types import Message, Request
from cogumi.data.world.questions import draw_fresh, made_with
from cogumi.engine.embedder import Embedder
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.evaluate.suites.minilm import cached_embedder
from cogumi.evaluate.suites.public_datasets import READERS, Sources, read_dataset
from cogumi.evaluate.suites.question_router import question_features
from cogumi.evaluate.suites.sentence_vectors import embed_all
from cogumi.train.fit_classifier import fit_classifier

Doubles = NDArray[np.float64]
Item = TypeVar("Item")

KNOWN = ("gsm8k", "mbpp", "mmlu", "bfcl")
FOREIGN = ("strategyqa", "truthfulqa", "ifeval")  # never used for training
OTHER = tuple(name for name in READERS if name not in KNOWN + FOREIGN)
NO_DOMAIN = "other"
HELD_FILES = {"gsm8k": {"test.jsonl"}, "mbpp": {"sanitized-mbpp.json"}}  # of mmlu and bfcl a random share
HELD_SHARE = 0.25
TRAIN_ROWS, OTHER_ROWS, JUDGED_ROWS, FOREIGN_ROWS = 2500, 700, 400, 250  # per data set
SELECTION = 0.15  # share of the training rows used to set the scope threshold
FALSE_ALARMS = 0.05
EPOCHS = 10
PER_CELL = 40
CONTEXT = 512
TIMED = 200


@dataclass(frozen=True, slots=True)
class Questions:
    """Questions and the data set of each."""

    texts: list[str]
    datasets: list[str]

    def add(self, dataset: str, texts: Sequence[str]) -> None:
        """Append questions of one data set."""
        self.texts.extend(texts)
        self.datasets.extend([dataset] * len(texts))


def _held(dataset: str, sources: Sources, draw: np.random.Generator) -> set[str]:
    """The held-out sources of a data set: `HELD_FILES`, or random ones up to the share `HELD_SHARE` of questions."""
    if dataset in HELD_FILES:
        return HELD_FILES[dataset]
    total, held, taken = sum(map(len, sources.values())), set(), 0
    for name in draw.permutation(sorted(sources)):
        if taken + len(sources[name]) <= HELD_SHARE * total:
            held.add(str(name))
            taken += len(sources[name])
    return held


def _sample(texts: Sequence[str], most: int, draw: np.random.Generator) -> list[str]:
    return [texts[i] for i in draw.permutation(len(texts))[:most]]


def gather(data: Path, seed: int) -> tuple[Questions, Questions, Questions]:
    """Questions to train on, to measure on (other files of the same data sets), and of the `FOREIGN` data sets."""
    draw = np.random.default_rng(seed)
    training, judged, foreign = Questions([], []), Questions([], []), Questions([], [])
    for name in KNOWN:
        sources = read_dataset(data, name)
        held = _held(name, sources, draw)
        training.add(name, _sample([t for n, ts in sources.items() if n not in held for t in ts], TRAIN_ROWS, draw))
        judged.add(name, _sample([t for n, ts in sources.items() if n in held for t in ts], JUDGED_ROWS, draw))
    for name in OTHER + FOREIGN:
        texts = [text for part in read_dataset(data, name).values() for text in part]
        if name in FOREIGN:
            foreign.add(name, _sample(texts, FOREIGN_ROWS, draw))
        else:
            training.add(NO_DOMAIN, _sample(texts, OTHER_ROWS, draw))
    return training, judged, foreign


def _figure(name: str, hits: Sequence[bool] | NDArray[np.bool_], goal: str = "", note: str = "") -> Figure:
    """A share with exact binomial 95% bounds (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    n, k = len(hits), int(np.sum(hits))
    if not n:
        return Figure(name, None, goal, note="no such question")
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return Figure(name, k / n, goal, low, high, f"{note}; n {n}".removeprefix("; "))


def _by_name(hits: NDArray[np.bool_], names: Sequence[str]) -> str:
    """The share of hits for each name, as text."""
    of = np.array(names)
    return ", ".join(f"{name} {hits[of == name].mean():.2f}" for name in dict.fromkeys(names))


def features_of(vector: Doubles | NDArray[np.float32], text: str) -> Doubles:
    """Input of the router of real questions: embedding [width] and surface features."""
    return np.concatenate([vector, question_features(text)])


def real_questions(
    task: Task, training: Questions, judged: Questions, foreign: Questions, embedder: Embedder
) -> list[Figure]:
    """Train and measure the router on embeddings."""
    from sklearn.linear_model import LogisticRegression

    groups = [training, judged, foreign]
    texts = [text for group in groups for text in group.texts]
    vectors = embed_all(embedder, texts, task.progress)
    rows = np.array([features_of(vector, text) for vector, text in zip(vectors, texts, strict=True)])
    cuts = np.cumsum([len(group.texts) for group in groups])[:-1]
    (x, own, other), (plain_x, plain_own, _) = np.split(rows, cuts), np.split(vectors, cuts)
    labels, truth = np.array(training.datasets), np.array(judged.datasets)
    in_scope = labels != NO_DOMAIN
    selection = in_scope & (np.random.default_rng(task.seed).random(len(x)) < SELECTION)
    net = Net.of(*fit_classifier(x[~selection], list(labels[~selection]), EPOCHS, task.seed))
    scope = scope_for(_known(net, x[selection]).max(axis=1), FALSE_ALARMS)
    p = _known(net, own)
    right = np.array(KNOWN)[p.argmax(axis=1)] == truth
    line = LogisticRegression(max_iter=1000).fit(plain_x[in_scope], labels[in_scope])
    plain = line.predict(plain_own) == truth
    out, alarms = _known(net, other).max(axis=1) < scope, p.max(axis=1) < scope
    step = max(len(own) // TIMED, 1)  # questions of all data sets
    without = _milliseconds(lambda row: net.probabilities(row), list(own[::step]))
    whole = _milliseconds(
        lambda text: net.probabilities(features_of(embedder.embed([text])[0], text)), judged.texts[::step]
    )
    note = f"scope {scope:.3f}, cut at {FALSE_ALARMS:.0%} of the selection rows"
    return [
        _figure("real questions: accuracy on unseen files", right, ">= 0.95", _by_name(right, judged.datasets)),
        _figure(
            "real questions: accuracy, logistic regression on embeddings", plain, "", _by_name(plain, judged.datasets)
        ),
        _figure("real questions: out-of-scope recall on unseen kinds", out, "", _by_name(out, foreign.datasets)),
        _figure(
            "real questions: false alarms on unseen files", alarms, "", f"{note}; {_by_name(alarms, judged.datasets)}"
        ),
        Figure("milliseconds per question without the embedding", without, "< 5", note="median"),
        Figure("milliseconds per question with the embedding", whole, "< 15", note="median"),
    ]


def _known(net: Net, x: Doubles) -> Doubles:
    """Probabilities of the known data sets [n, len(KNOWN)]."""
    return np.array([[p[name] for name in KNOWN] for p in map(net.probabilities, x)])


def _milliseconds(work: Callable[[Item], object], items: Sequence[Item]) -> float:
    """Median milliseconds of `work` on each item."""
    seconds = []
    for item in items:
        began = time.perf_counter()
        work(item)
        seconds.append(time.perf_counter() - began)
    return 1000 * float(np.median(seconds))


def _read(draft: LlamaEngine, messages: tuple[Message, ...]) -> Doubles | None:
    """Input of the bundle's router for a question; None if it exceeds the draft's context."""
    try:
        return router_input(draft.read(Request(messages=messages)))
    except ContextError:
        return None


def own_router(task: Task, folder: Path, foreign: Questions) -> list[Figure]:
    """Figures of the bundle's router on new questions of its world and on real ones, and of its pre-loading."""
    bundle = open_bundle(folder)
    made_for = bundle.description.get("measured", {}).get("examples", {})
    if "unseen_kinds" not in made_for:
        raise CogumiError(
            "this bundle was not made for the built-in world: leave the bundle out to judge real questions"
        )
    net, scope = load_net(bundle.router), load_scope(bundle.router)
    seed = int(bundle.description.get("seed", 0))
    examples = draw_fresh(PER_CELL, seed, task.progress, config=made_with(made_for))
    with closing(LlamaEngine(bundle.draft or bundle.base, slots=1, context=CONTEXT, lookup=False)) as draft:
        own = _rows(draft, [e.messages for e in examples])
        other = _rows(draft, [(Message("user", text),) for text in foreign.texts])
        whole = _milliseconds(
            lambda e: net.probabilities(router_input(draft.read(Request(messages=e.messages)))), examples[:TIMED]
        )
    truth = np.array([examples[i].domain for i in own])
    x = np.array(list(own.values()))
    right = np.array([max(p, key=lambda name: p[name]) for p in map(net.probabilities, x)]) == truth
    alarms = confidences(net, x) < scope
    out = confidences(net, np.array(list(other.values()))) < scope
    note = f"scope {scope:.3f}" if scope else "this bundle's router has no scope: build it again"
    loaded = [preload(net.probabilities(row), tuple(bundle.modifiers)) for row in own.values()]
    wrong = np.array([name != domain for name, domain in zip(loaded, truth, strict=True) if name], dtype=bool)
    ahead = np.array([bool(name) for name, domain in zip(loaded, truth, strict=True) if domain in bundle.modifiers])
    return [
        _figure("bundle's router: accuracy on fresh questions", right, ">= 0.97", _by_name(right, list(truth))),
        _figure("bundle's router: false alarms on fresh questions", alarms, "", note),
        _figure(
            "bundle's router: out-of-scope recall on real questions",
            out,
            "",
            f"{note}; {_by_name(out, [foreign.datasets[i] for i in other])}",
        ),
        _figure("wrong pre-loads", wrong, "< 0.07", "of the questions that load a modifier ahead"),
        _figure("pre-loaded", ahead, "", "of the questions whose domain has a modifier"),
        Figure("milliseconds per question, draft's reading and router", whole, "< 15", note="median"),
    ]


def _rows(draft: LlamaEngine, questions: Sequence[tuple[Message, ...]]) -> dict[int, Doubles]:
    """Router inputs by index of the question; questions that are too long are left out."""
    read = ((i, _read(draft, messages)) for i, messages in enumerate(questions))
    return {i: row for i, row in read if row is not None}


def run(task: Task) -> Findings:
    """Measure on the real questions in `task.data`, and `task.bundle` if given. Raises `CogumiError` without data."""
    if task.data is None:
        raise CogumiError(f"the suite 'domains' needs --data: the folder that holds {', '.join(READERS)}")
    began = time.monotonic()
    training, judged, foreign = gather(task.data, task.seed)
    figures = real_questions(task, training, judged, foreign, cached_embedder())
    if task.bundle is not None:
        real = Questions(judged.texts + foreign.texts, judged.datasets + foreign.datasets)
        figures += own_router(task, task.bundle, real)
    facts = {
        "learned": len(training.texts),
        "judged": len(judged.texts),
        "foreign": len(foreign.texts),
        "kinds of 'other'": list(OTHER),
        "kinds never trained on": list(FOREIGN),
        "seconds": round(time.monotonic() - began, 1),
    }
    return Findings(figures, facts)
