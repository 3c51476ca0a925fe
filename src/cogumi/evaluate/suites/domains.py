"""Suite `domains`: does the domain router send real questions where they belong, and notice foreign ones? (SPEC F5, F6)

Two routers are judged. One is trained here, on sentence embeddings and surface features of real questions of four
kinds (grade-school sums, Python tasks, exam questions, requests for a function call), and judged on files and subjects
that it has not seen. It learns a further class, `other`, from questions of none of these kinds; at run time that is the
base's business. Whether it notices what lies outside its scope is asked in the words of kinds it has never seen at all.

The second is the bundle's own, which reads the draft's states: judged on fresh questions of the world it was made for,
and on all those real ones, which are foreign to it.
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
from cogumi.confidence.domain_router import PRELOAD, confidences, preload, scope_for
from cogumi.confidence.nets import Net, load_net, load_scope
from cogumi.core.errors import CogumiError, ContextError
from cogumi.core.types import Example, Message, Request
from cogumi.data.world.questions import fresh
from cogumi.engine.embedder import Embedder
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.evaluate.suite import Figure, Findings, Task
from cogumi.evaluate.suites.minilm import cached_embedder
from cogumi.evaluate.suites.public_datasets import READERS, Sources, read_kind
from cogumi.evaluate.suites.question_router import question_features
from cogumi.evaluate.suites.sentence_vectors import embed_all
from cogumi.train.fit_classifier import fit_classifier

Doubles = NDArray[np.float64]
Item = TypeVar("Item")

KNOWN = ("gsm8k", "mbpp", "mmlu", "bfcl")
FOREIGN = ("strategyqa", "truthfulqa", "ifeval")  # never trained on
OTHER = tuple(kind for kind in READERS if kind not in KNOWN + FOREIGN)
NO_DOMAIN = "other"
HELD_FILES = {"gsm8k": {"test.jsonl"}, "mbpp": {"sanitized-mbpp.json"}}  # of mmlu and bfcl a share, by the seed
HELD_SHARE = 0.25
TRAIN_ROWS, OTHER_ROWS, JUDGED_ROWS, FOREIGN_ROWS = 2500, 700, 400, 250  # per kind
SELECTION = 0.15  # of the training rows: where the scope is cut
FALSE_ALARMS = 0.05
EPOCHS = 10
PER_CELL = 40
CONTEXT = 512
TIMED = 200


@dataclass(frozen=True, slots=True)
class Asked:
    """Questions and the kind of each."""

    texts: list[str]
    kinds: list[str]

    def add(self, kind: str, texts: Sequence[str]) -> None:
        """Append questions of one kind."""
        self.texts.extend(texts)
        self.kinds.extend([kind] * len(texts))


def _held(kind: str, sources: Sources, draw: np.random.Generator) -> set[str]:
    """The sources of a kind that are kept for judging: those named, else as many of a shuffle as fit into a share."""
    if kind in HELD_FILES:
        return HELD_FILES[kind]
    total, held, taken = sum(map(len, sources.values())), set(), 0
    for name in draw.permutation(sorted(sources)):
        if taken + len(sources[name]) <= HELD_SHARE * total:
            held.add(str(name))
            taken += len(sources[name])
    return held


def _sample(texts: Sequence[str], most: int, draw: np.random.Generator) -> list[str]:
    return [texts[i] for i in draw.permutation(len(texts))[:most]]


def gather(data: Path, seed: int) -> tuple[Asked, Asked, Asked]:
    """Questions to train on, to judge on (other files of the same kinds), and of `FOREIGN` kinds."""
    draw = np.random.default_rng(seed)
    learned, judged, foreign = Asked([], []), Asked([], []), Asked([], [])
    for kind in KNOWN:
        sources = read_kind(data, kind)
        held = _held(kind, sources, draw)
        learned.add(kind, _sample([t for n, ts in sources.items() if n not in held for t in ts], TRAIN_ROWS, draw))
        judged.add(kind, _sample([t for n, ts in sources.items() if n in held for t in ts], JUDGED_ROWS, draw))
    for kind in OTHER + FOREIGN:
        texts = [text for part in read_kind(data, kind).values() for text in part]
        if kind in FOREIGN:
            foreign.add(kind, _sample(texts, FOREIGN_ROWS, draw))
        else:
            learned.add(NO_DOMAIN, _sample(texts, OTHER_ROWS, draw))
    return learned, judged, foreign


def _figure(name: str, hits: Sequence[bool] | NDArray[np.bool_], goal: str = "", note: str = "") -> Figure:
    """A share with the exact 95% bounds of a binomial one (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    n, k = len(hits), int(np.sum(hits))
    if not n:
        return Figure(name, None, goal, note="no such question")
    low = float(beta.ppf(0.025, k, n - k + 1)) if k else 0.0
    high = float(beta.ppf(0.975, k + 1, n - k)) if k < n else 1.0
    return Figure(name, k / n, goal, low, high, f"{note}; n {n}".removeprefix("; "))


def _by_kind(hits: NDArray[np.bool_], kinds: Sequence[str]) -> str:
    names = np.array(kinds)
    return ", ".join(f"{kind} {hits[names == kind].mean():.2f}" for kind in dict.fromkeys(kinds))


def seen(vector: Doubles | NDArray[np.float32], text: str) -> Doubles:
    """What the router of real questions sees: embedding [width] and surface features."""
    return np.concatenate([vector, question_features(text)])


def real_questions(task: Task, learned: Asked, judged: Asked, foreign: Asked, embedder: Embedder) -> list[Figure]:
    """The router on embeddings, trained and judged."""
    from sklearn.linear_model import LogisticRegression

    asked = [learned, judged, foreign]
    texts = [text for part in asked for text in part.texts]
    vectors = embed_all(embedder, texts, task.progress)
    rows = np.array([seen(vector, text) for vector, text in zip(vectors, texts, strict=True)])
    cuts = np.cumsum([len(part.texts) for part in asked])[:-1]
    (x, own, other), (plain_x, plain_own, _) = np.split(rows, cuts), np.split(vectors, cuts)
    labels, truth = np.array(learned.kinds), np.array(judged.kinds)
    mine = labels != NO_DOMAIN
    kept = mine & (np.random.default_rng(task.seed).random(len(x)) < SELECTION)
    net = Net.of(*fit_classifier(x[~kept], list(labels[~kept]), EPOCHS, task.seed))
    scope = scope_for(_known(net, x[kept]).max(axis=1), FALSE_ALARMS)
    p = _known(net, own)
    right = np.array(KNOWN)[p.argmax(axis=1)] == truth
    line = LogisticRegression(max_iter=1000).fit(plain_x[mine], labels[mine])
    plain = line.predict(plain_own) == truth
    out, alarms = _known(net, other).max(axis=1) < scope, p.max(axis=1) < scope
    step = max(len(own) // TIMED, 1)  # through all kinds
    sure = _milliseconds(lambda row: net.probabilities(row), list(own[::step]))
    whole = _milliseconds(lambda text: net.probabilities(seen(embedder.embed([text])[0], text)), judged.texts[::step])
    note = f"scope {scope:.3f}, cut at {FALSE_ALARMS:.0%} of the selection rows"
    return [
        _figure("real questions: accuracy on unseen files", right, ">= 0.95", _by_kind(right, judged.kinds)),
        _figure(
            "real questions: accuracy, logistic regression on embeddings", plain, "", _by_kind(plain, judged.kinds)
        ),
        _figure("real questions: out-of-scope recall on unseen kinds", out, "", _by_kind(out, foreign.kinds)),
        _figure(
            "real questions: false alarms on unseen files", alarms, "", f"{note}; {_by_kind(alarms, judged.kinds)}"
        ),
        Figure("milliseconds per question without the embedding", sure, "< 5", note="median"),
        Figure("milliseconds per question with the embedding", whole, "< 15", note="median"),
    ]


def _known(net: Net, x: Doubles) -> Doubles:
    """Probabilities of the known kinds [n, len(KNOWN)]."""
    return np.array([[p[kind] for kind in KNOWN] for p in map(net.probabilities, x)])


def _milliseconds(work: Callable[[Item], object], items: Sequence[Item]) -> float:
    spent = []
    for item in items:
        began = time.perf_counter()
        work(item)
        spent.append(time.perf_counter() - began)
    return 1000 * float(np.median(spent))


def _read(draft: LlamaEngine, messages: tuple[Message, ...]) -> Doubles | None:
    """What the bundle's router sees of a question; None if that does not fit the draft's context."""
    try:
        return router_input(draft.read(Request(messages=messages)))
    except ContextError:
        return None


def own_router(task: Task, folder: Path, foreign: Asked) -> list[Figure]:
    """The bundle's router on fresh questions of its world and on real ones, and what would be loaded too early."""
    bundle = open_bundle(folder)
    if "unseen_kinds" not in bundle.description.get("measured", {}).get("examples", {}):
        raise CogumiError(
            "this bundle was not made for the built-in world: leave the bundle out to judge real questions"
        )
    net, scope = load_net(bundle.router), load_scope(bundle.router)
    examples = fresh(PER_CELL, int(bundle.description.get("seed", 0)), task.progress)
    with closing(LlamaEngine(bundle.draft or bundle.base, slots=1, context=CONTEXT, lookup=False)) as draft:
        own = _rows(draft, [e.messages for e in examples])
        other = _rows(draft, [(Message("user", text),) for text in foreign.texts])
        early = [_early(draft, net, e, tuple(bundle.modifiers)) for e in examples]
        whole = _milliseconds(
            lambda e: net.probabilities(router_input(draft.read(Request(messages=e.messages)))), examples[:TIMED]
        )
    truth = np.array([examples[i].domain for i in own])
    x = np.array(list(own.values()))
    right = np.array([max(p, key=lambda name: p[name]) for p in map(net.probabilities, x)]) == truth
    alarms = confidences(net, x) < scope
    out = confidences(net, np.array(list(other.values()))) < scope
    note = f"scope {scope:.3f}" if scope else "this bundle's router has no scope: build it again"
    loaded = [(guess, e.domain) for guess, e in zip(early, examples, strict=True) if guess is not None]
    wrong = np.array([guess != domain for guess, domain in loaded], dtype=bool)
    mine = np.array(
        [guess is not None for guess, e in zip(early, examples, strict=True) if e.domain in bundle.modifiers]
    )
    return [
        _figure("bundle's router: accuracy on fresh questions", right, ">= 0.97", _by_kind(right, list(truth))),
        _figure("bundle's router: false alarms on fresh questions", alarms, "", note),
        _figure(
            "bundle's router: out-of-scope recall on real questions",
            out,
            "",
            f"{note}; {_by_kind(out, [foreign.kinds[i] for i in other])}",
        ),
        _figure("wrong pre-loads", wrong, "< 0.07", f"of those decided within {PRELOAD[-1][0]} tokens of a question"),
        _figure("pre-loaded in time", mine, "", "of the questions whose domain has a modifier"),
        Figure("milliseconds per question, draft's reading and router", whole, "< 15", note="median"),
    ]


def _rows(draft: LlamaEngine, questions: Sequence[tuple[Message, ...]]) -> dict[int, Doubles]:
    """Router inputs by the place of the question; those too long are left out."""
    read = ((i, _read(draft, messages)) for i, messages in enumerate(questions))
    return {i: row for i, row in read if row is not None}


def _early(draft: LlamaEngine, net: Net, example: Example, modifiers: Sequence[str]) -> str | None:
    """The modifier that would be loaded while a question is still being typed, by its first tokens."""
    ids = draft.tokenizer.encode(example.messages[-1].content)
    for tokens, _ in PRELOAD:
        begun = Message("user", draft.tokenizer.decode(ids[:tokens]))
        row = _read(draft, (*example.messages[:-1], begun))
        found = None if row is None else preload(net.probabilities(row), modifiers, tokens)
        if found is not None:
            return found
    return None


def run(task: Task) -> Findings:
    """Judge on the real questions below `task.data`, and `task.bundle` if named. Raises `CogumiError` without data."""
    if task.data is None:
        raise CogumiError(f"the suite 'domains' needs --data: the folder that holds {', '.join(READERS)}")
    began = time.monotonic()
    learned, judged, foreign = gather(task.data, task.seed)
    figures = real_questions(task, learned, judged, foreign, cached_embedder())
    if task.bundle is not None:
        real = Asked(judged.texts + foreign.texts, judged.kinds + foreign.kinds)
        figures += own_router(task, task.bundle, real)
    facts = {
        "learned": len(learned.texts),
        "judged": len(judged.texts),
        "foreign": len(foreign.texts),
        "kinds of 'other'": list(OTHER),
        "kinds never trained on": list(FOREIGN),
        "seconds": round(time.monotonic() - began, 1),
    }
    return Findings(figures, facts)
