"""Suite `learning`: online recalibration under drift, by simulation with the real Memory and Learner (SPEC F16, F17).

No model is needed: a question has a true P(correct), and the gate's p is a calibrated estimate of it until a drift.
Users rate answers: most honestly (2% slips), some carelessly (15%), some always as right, some always with the opposite
of the truth. The learner gets the same information as in a server. Quality is measured on the true P(correct), not on
votes: the expected Brier score of the P(correct) shown, and the share of wrong answers among those accepted at the
threshold that was guaranteed before the drift.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.memory.learner import Learner
from cogumi.cascade.memory.turns import Memory, Turn
from cogumi.confidence.guarantee import Guarantee, RiskLimit, guarantee, threshold_order
from cogumi.confidence.nets import sigmoid
from cogumi.confidence.recalibration import logit
from cogumi.evaluate.suite import Figure, Findings, Task

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

DOMAINS = ("math", "code", "tools", "reading", "facts")
EASE = np.array([1.0, 2.0, 2.5, 1.5, 0.5])  # mean logit of a right answer
SPREAD = 1.6
EVEN = (0.2, 0.2, 0.2, 0.2, 0.2)
PEOPLE = 400
NEWCOMERS = 200
RATED = 0.9  # share of answers that are rated
RATERS = {"honest": 0.80, "careless": 0.10, "lazy": 0.06, "malicious": 0.04}
SLIPS = {"honest": 0.02, "careless": 0.15, "malicious": 0.98}
RISK = 0.05
WINDOW = 3_000  # turns per point of the picture


@dataclass(frozen=True, slots=True)
class Phase:
    """A period without change: `shift` is added to the true logit per domain, `mix` are the shares of the domains; a
    share `new` of the questions come from new users, whose questions are `harder` in every domain.
    """

    name: str
    turns: int
    mix: Sequence[float] = EVEN
    shift: Sequence[float] = (0.0,) * 5
    new: float = 0.0
    harder: float = 0.0


WORSE = (-2.0, 0.0, 0.0, 0.0, 0.0)
PHASES = (
    Phase("calm", 18_000),
    Phase("one domain worse", 20_000, (0.4, 0.15, 0.15, 0.15, 0.15), WORSE),
    Phase("still worse", 6_000, (0.4, 0.15, 0.15, 0.15, 0.15), WORSE),
    Phase("new people too", 10_000, (0.4, 0.15, 0.15, 0.15, 0.15), WORSE, new=0.5, harder=1.0),
    Phase("as before", 12_000),
)
ATTACKED = 2  # the phase that is repeated with a copy of the server and an attacker
ATTACK = 5_000  # votes of the attacker


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Questions [n] in order: user, domain, the gate's p, true P(correct), and vote (1: right, 0: wrong, -1: none)."""

    user: Ints
    domain: Ints
    p: Doubles
    truth: Doubles
    vote: Ints


def ask(
    rng: np.random.Generator, user: Ints, domain: Ints, shift: Doubles, raters: Sequence[str], rated: float = RATED
) -> Stream:
    """Questions of these users [n] in these domains [n], with `shift` [n] added to their true logits."""
    z = rng.normal(EASE[domain], SPREAD)
    p, truth = sigmoid(z), sigmoid(z + shift)
    right = rng.random(len(z)) < truth
    slips = np.array([SLIPS.get(kind, 0.0) for kind in raters])[user]
    lazy = np.array([kind == "lazy" for kind in raters])[user]
    vote = np.where(lazy, 1, right ^ (rng.random(len(z)) < slips))
    return Stream(user, domain, p, truth, np.where(rng.random(len(z)) < rated, vote, -1))


def stream_of(phase: Phase, rng: np.random.Generator, raters: Sequence[str]) -> Stream:
    """The questions of a phase."""
    n = phase.turns
    late = rng.random(n) < phase.new
    user = np.where(late, rng.integers(PEOPLE, PEOPLE + NEWCOMERS, n), rng.integers(0, PEOPLE, n))
    domain = rng.choice(len(DOMAINS), n, p=phase.mix)
    return ask(rng, user, domain, np.array(phase.shift)[domain] - phase.harder * late, raters)


def attacked(stream: Stream, rng: np.random.Generator, attacker: int, votes: int) -> Stream:
    """The stream with questions of an attacker inserted, who always votes against the gate."""
    at = np.sort(rng.integers(0, len(stream.p), votes))
    domain = rng.integers(0, len(DOMAINS), votes)
    p = sigmoid(rng.normal(EASE[domain], SPREAD))
    columns = np.full(votes, attacker), domain, p, p, (p < 0.5).astype(np.int64)
    names = "user", "domain", "p", "truth", "vote"
    return Stream(*(np.insert(getattr(stream, name), at, new) for name, new in zip(names, columns, strict=True)))


def people(rng: np.random.Generator, n: int) -> list[str]:
    """The kind of rater of each of `n` users, at random."""
    return [str(kind) for kind in rng.choice(list(RATERS), n, p=list(RATERS.values()))]


class SimulatedServer:
    """A server with memory and learner: each question is answered, stored and perhaps rated, as in `cascade`."""

    def __init__(self, folder: Path, promises: Sequence[Guarantee], **options: Any) -> None:
        self.memory = Memory(folder / "memory.db")
        self.learner = Learner(self.memory, folder, promises, **options)
        self.asked: list[float] = []  # times of all questions
        self.slowest = 0.0
        self._name = folder.name

    def run(self, stream: Stream, rng: np.random.Generator) -> Doubles:
        """Process a stream; returns the P(correct) shown for each question [n]."""
        shown = np.zeros(len(stream.p))
        signals = signals_of(stream, rng)
        rows = zip(*(x.tolist() for x in (stream.user, stream.domain, stream.p, stream.vote)), strict=True)
        for i, (user, domain, p, vote) in enumerate(rows):
            id, name = f"{self._name}-{len(self.asked)}", f"user-{user}"
            shown[i] = self.learner.p_correct(id, name, p, signals[i])
            self.asked.append(time.time())
            content = f"question {id}", "answer", DOMAINS[domain], "base", "base", "fast"
            self.memory.remember(Turn(id, name, "", self.asked[-1], *content, p, signals[i], None))
            if vote >= 0:
                began = time.perf_counter()
                self.learner.rated(self.memory.rate(id, name, bool(vote)))
                self.slowest = max(self.slowest, time.perf_counter() - began)
        return shown

    def events(self) -> list[tuple[int, str]]:
        """(index of the question, event of the learned correction)."""
        history = self.learner.state()["history"]
        return [(int(np.searchsorted(self.asked, event["at"])), event["event"]) for event in history]


def signals_of(stream: Stream, rng: np.random.Generator) -> list[dict[str, float]]:
    """Signals like those of the cascade: a router that is right for 95% of questions, log-probability, length."""
    n = len(stream.p)
    routed = np.where(rng.random(n) < 0.95, stream.domain, rng.integers(0, len(DOMAINS), n))
    share = np.full((n, len(DOMAINS)), 0.02)
    share[np.arange(n), routed] = 0.92
    logprob, length = -np.exp(-logit(stream.p) / 3) + rng.normal(0, 0.2, n), rng.normal(3.0, 0.8, n)
    names = [*(f"domain_{name}" for name in DOMAINS), "mean_logprob", "log_length"]
    table = np.column_stack([share, logprob, length]).tolist()
    return [dict(zip(names, row, strict=True)) for row in table]


def brier(shown: Doubles, truth: Doubles) -> float:
    """Expected Brier score of the shown P(correct) [n] for the true P(correct) `truth` [n]."""
    return float(np.mean((shown - truth) ** 2 + truth * (1 - truth)))


def accepted(shown: Doubles, truth: Doubles, threshold: float) -> tuple[float, float]:
    """Share of answers accepted, and share of wrong ones among them."""
    taken = shown >= threshold
    return float(taken.mean()), float((1 - truth[taken]).mean()) if taken.any() else 0.0


def promise_of(rng: np.random.Generator) -> Guarantee:
    """The guarantee of the gate, calibrated before any drift."""

    def counter(n: int) -> Any:
        domain = rng.integers(0, len(DOMAINS), n)
        p = sigmoid(rng.normal(EASE[domain], SPREAD))
        wrong = rng.random(n) > p
        return lambda t: (int((p >= t).sum()), int((wrong & (p >= t)).sum()))

    order = threshold_order([RiskLimit(counter(3_000), RISK)], 2, 0.95)
    return guarantee(order, [RiskLimit(counter(6_000), RISK)], 6_000, 0.95)


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """Results of all phases: per phase the gate's p, the P(correct) shown and the true one, each [n]."""

    p: Sequence[Doubles]
    shown: Sequence[Doubles]
    truth: Sequence[Doubles]
    events: Sequence[tuple[int, str]]
    slowest: float

    def worse(self) -> list[float]:
        """Relative change of the Brier score by the correction, per phase: 0.01 is 1% worse than the gate alone."""
        return [brier(q, t) / brier(p, t) - 1 for p, q, t in zip(self.p, self.shown, self.truth, strict=True)]


def run_phase(server: SimulatedServer, number: int, seed: int, attack: int = 0) -> tuple[Doubles, Doubles, Doubles]:
    """Run a phase; the gate's p, the P(correct) shown and the true one, each [n]. `attack` is the number of votes of an
    attacker, whose own questions are left out of the result.
    """
    rng = np.random.default_rng([seed, number])
    raters = [*people(np.random.default_rng(seed), PEOPLE + NEWCOMERS), "malicious"]
    stream = stream_of(PHASES[number], rng, raters)
    if attack:
        stream = attacked(stream, rng, PEOPLE + NEWCOMERS, attack)
    shown = server.run(stream, rng)
    own = stream.user < PEOPLE + NEWCOMERS
    return stream.p[own], shown[own], stream.truth[own]


def run_phases(promise: Guarantee, seed: int) -> tuple[History, Doubles, list[str]]:
    """Run all phases; also the P(correct) shown by a copy of the server in phase `ATTACKED` under attack, and its
    events.
    """
    with tempfile.TemporaryDirectory() as root:
        folder, copy = Path(root, "alone"), Path(root, "attacked")
        server = SimulatedServer(folder, [promise])
        found = []
        for number in range(len(PHASES)):
            if number == ATTACKED:
                shutil.copytree(folder, copy)  # safe, because no thread writes now
            found.append(run_phase(server, number, seed))
        server.memory.close()
        other = SimulatedServer(copy, [promise])
        _, under_attack, _ = run_phase(other, ATTACKED, seed, ATTACK)
        other.memory.close()
        events = [event for at, event in other.events() if at]
        p, shown, truth = zip(*found, strict=True)
        return History(p, shown, truth, server.events(), server.slowest), under_attack, events


PROFILES = ("like all others", "harder questions", "other strengths")
_OFFSETS = np.array([[0.0] * 5, [-1.2] * 5, [-1.5, 1.0, -1.5, 1.0, 0.0]])  # of the true logit, per profile and domain


def personal(promise: Guarantee, seed: int, votes: int, *, each: int = 8, neighbours: bool = False) -> Doubles:
    """Relative change of the Brier score by personal correction for `each` users of each profile [profiles, each], on
    300 questions after `votes` ratings.
    """
    rng = np.random.default_rng([seed, 7])
    people = np.arange(len(PROFILES) * each)

    def stream(n: int) -> Stream:
        user = rng.permutation(np.repeat(people, n))
        domain = rng.integers(0, len(DOMAINS), len(user))
        return ask(rng, user, domain, _OFFSETS[user // each, domain], ["honest"] * len(people), rated=1.0)

    with tempfile.TemporaryDirectory() as folder:
        server = SimulatedServer(Path(folder), [promise], neighbours=neighbours)
        for user in people:
            server.memory.set_personal(f"user-{user}", True)
        server.run(stream(votes), rng)
        later = stream(300)
        shown = np.zeros(len(later.p))
        rows = zip(later.user.tolist(), later.p.tolist(), signals_of(later, rng), strict=True)
        for i, (user, p, signals) in enumerate(rows):
            shown[i] = server.learner.p_correct(f"later-{i}", f"user-{user}", p, signals)
        server.memory.close()
    worse = [
        brier(shown[u], later.truth[u]) / brier(later.p[u], later.truth[u]) - 1 for u in later.user == people[:, None]
    ]
    return np.array(worse).reshape(len(PROFILES), each)


def run(task: Task) -> Findings:
    """Run the simulation; needs neither a bundle nor data."""
    began = time.perf_counter()
    promise = promise_of(np.random.default_rng([task.seed, 99]))
    history, attack, events = run_phases(promise, task.seed)
    task.progress(1, 2, {"worst_phase": max(history.worse())})
    persons = personal(promise, task.seed, 200)
    few = [personal(promise, task.seed, 60, neighbours=on) for on in (False, True)]
    pictures = []
    if task.out:
        pictures.append(task.out / "learning.png")
        picture(pictures[0], history, promise)
    return Findings(
        [*_drift_figures(history, promise), _attack_figure(history, attack), *_personal_figures(persons, *few)],
        {
            "questions": sum(map(len, history.p)),
            "attacker's votes": ATTACK,
            "events": [f"{event} at question {at}" for at, event in history.events],
            "events under attack": events,
            "slowest rating, seconds": round(history.slowest, 2),
            "threshold": promise.threshold,
            "seconds": round(time.perf_counter() - began, 1),
            "measured on": "the simulator's true P(correct); Brier scores relative to the uncorrected gate's",
        },
        pictures,
    )


def _drift_figures(history: History, promise: Guarantee) -> list[Figure]:
    figures = []
    for i, (phase, worse) in enumerate(zip(PHASES, history.worse(), strict=True)):
        before, after = (accepted(x[i], history.truth[i], promise.threshold) for x in (history.p, history.shown))
        changed = any(phase.shift) or phase.harder
        note = f"{before[0]:.1%} accepted, {before[1]:.1%} of them wrong -> {after[0]:.1%}, {after[1]:.1%}"
        figures.append(Figure(f"Brier score, {phase.name}", worse, "<= -0.01" if changed else "<= 0.005", note=note))
    ends = np.cumsum([phase.turns for phase in PHASES])
    back = [event for at, event in history.events if at >= ends[-2]]
    promoted = sum(event == "promoted" for _, event in history.events)
    figures.append(Figure("Brier score, worst phase", max(history.worse()), "<= 0.005"))
    figures.append(Figure("promotions", promoted, ">= 1"))
    figures.append(Figure("rollbacks after the return", back.count("rolled back"), ">= 1"))
    return figures


def _attack_figure(history: History, attacked: Doubles) -> Figure:
    p, shown, truth = (x[ATTACKED] for x in (history.p, history.shown, history.truth))
    change = brier(attacked, truth) / brier(shown, truth) - 1
    note = f"{ATTACK} votes; gate alone {brier(p, truth):.4f}, learning without attacker {brier(shown, truth):.4f}"
    return Figure("Brier score, one attacker against none", change, "<= 0.005", note=note)


def _personal_figures(persons: Doubles, few: Doubles, together: Doubles) -> list[Figure]:
    figures = []
    for profile, worse, alone, helped in zip(PROFILES, persons, few, together, strict=True):
        note = f"200 votes each; after 60: {alone.mean():+.1%} alone, {helped.mean():+.1%} with neighbours"
        goal = "<= 0.005" if profile == PROFILES[0] else "<= -0.01"
        figures.append(Figure(f"Brier score, people: {profile}", float(worse.mean()), goal, note=note))
    figures.append(Figure("Brier score, worst person", float(persons.max()), "<= 0.005", note="alone, 200 votes"))
    figures.append(
        Figure("Brier score, worst person with neighbours", float(together.max()), "<= 0.005", note="60 votes")
    )
    return figures


def picture(path: Path, history: History, promise: Guarantee) -> None:
    """Brier score and share of wrong accepted answers over time, with and without learning, and events."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    p, shown, truth = (np.concatenate(x) for x in (history.p, history.shown, history.truth))
    parts = [slice(i, i + WINDOW) for i in range(0, len(p) - WINDOW + 1, WINDOW // 3)]
    middle = [part.start + WINDOW / 2 for part in parts]
    canvas = Canvas(figsize=(11, 6), layout="constrained", dpi=100)
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(2, 1, sharex=True)
    for name, q, colour in (("gate alone", p, "0.6"), ("with learning", shown, "tab:blue")):
        axes[0].plot(middle, [brier(q[part], truth[part]) for part in parts], color=colour, label=name)
        wrong = [accepted(q[part], truth[part], promise.threshold)[1] for part in parts]
        axes[1].plot(middle, wrong, color=colour, label=name)
    axes[1].axhline(RISK, color="black", linestyle=":", linewidth=1, label="promise")
    styles = {"promoted": ("tab:green", "--"), "rolled back": ("tab:red", "--"), "dropped": ("tab:orange", ":")}
    starts = np.cumsum([0, *(phase.turns for phase in PHASES)])
    for axis in axes:
        for event, (colour, style) in styles.items():
            for number, at in enumerate(at for at, kind in history.events if kind == event):
                axis.axvline(at, color=colour, linestyle=style, linewidth=1, label=None if number else event)
        for start in starts[1:-1]:
            axis.axvline(start, color="0.85", linewidth=6, zorder=0)
    for start, phase in zip(starts, PHASES, strict=False):
        axes[0].text(start + 300, 1.01, phase.name, transform=axes[0].get_xaxis_transform(), fontsize=9)
    axes[0].set(ylabel="expected Brier score")
    axes[1].set(ylabel="wrong among accepted", xlabel=f"questions ({WINDOW} per point)")
    axes[0].legend(loc="upper right", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path)
