"""Opens a bundle as a cascade, with what is kept between runs."""

from __future__ import annotations

import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

from cogumi.bundle import Bundle, open_bundle
from cogumi.cascade.cache import AnswerCache
from cogumi.cascade.cascade import Cascade
from cogumi.cascade.critique import Critic
from cogumi.cascade.learning import Learner
from cogumi.cascade.memory import FILE, Memory
from cogumi.cascade.modes import Settings
from cogumi.cascade.parts import Parts
from cogumi.cascade.templates import Pair, Templates
from cogumi.cascade.tiers import Tiers
from cogumi.errors import BundleError, CogumiError
from cogumi.route.gate import KINDS, Calibration
from cogumi.route.nets import load_head, load_net, load_scope
from cogumi.runtime.embedder import Embedder
from cogumi.runtime.escalation import Escalation
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.runtime.shots import ADAPTER

REUSE = ("exact", "static", "verified")
"""Which answers are given again: those to the same question, to a near one, or to one that is proven to be the same."""


def open_cascade(
    folder: Path,
    *,
    slots: int = 8,
    context: int = 512,
    threads: int | None = None,
    cache: str | None = None,
    gate: str = KINDS[0],
    settings: Settings | None = None,
    state: Path | None = None,
    reuse: str | None = None,
) -> Cascade:
    """Open and verify a bundle as a cascade of `slots` requests at a time, `context` tokens each.

    `threads` per model and the type of their key-value `cache` (None: the engine's choice). `state` is the folder of
    what is kept between runs: session memory, what was learned, and answers to `reuse` (one of `REUSE`; these can also
    be kept in memory only). None: nothing is kept. Raises `BundleError` for a bundle that must not be opened.
    """
    bundle = open_bundle(folder)
    calibration = Calibration.from_json(bundle.calibration)
    with ExitStack() as opened:
        memory = Memory(state / FILE) if state else None
        if memory:
            opened.callback(memory.close)
        learner = Learner(memory, state, list(calibration.guarantees.values())) if memory and state else None
        embedder = Embedder(bundle.embedder) if bundle.embedder else None
        answers = _answers(bundle, embedder, reuse, state)
        if answers is not None:
            opened.callback(answers.close)
        tiers = _tiers(bundle, slots, context, threads, cache, opened)
        parts = Parts(
            tiers,
            calibration,
            settings or Settings(),
            gate,
            memory,
            learner,
            Escalation(bundle.escalation) if bundle.escalation else None,
            answers,
            Critic(bundle.critic) if bundle.critic else None,
            Templates(_examples(bundle.examples), embedder) if bundle.examples else None,
            bundle.fingerprint,
        )
        cascade = Cascade(parts, workers=slots)
        opened.pop_all()
    return cascade


def _tiers(
    bundle: Bundle, slots: int, context: int, threads: int | None, cache: str | None, opened: ExitStack
) -> Tiers:
    """The models, with heads that fit them; `opened` closes them."""
    difficulty, router = load_head(bundle.difficulty), load_net(bundle.router)
    if len(router.mean) != 2 * len(difficulty.mean):
        raise BundleError(f"{bundle.path}: router and difficulty head read different drafts; build it again")
    base = LlamaEngine(
        bundle.base,
        slots=slots,
        context=context,
        threads=threads,
        cache=cache,
        draft=bundle.draft,
        adapters=bundle.modifiers | ({ADAPTER: bundle.fewshot} if bundle.fewshot else {}),
        head=bundle.head,
        base_sha256=bundle.base_fingerprint,
    )
    opened.callback(base.close)
    draft = LlamaEngine(bundle.draft, slots=slots, context=context, threads=threads, cache=cache, lookup=False)
    opened.callback(draft.close)
    return Tiers(base, draft, difficulty, router, load_scope(bundle.router))


def _answers(bundle: Bundle, embedder: Embedder | None, reuse: str | None, state: Path | None) -> AnswerCache | None:
    """The answers that may be given again. Raises `CogumiError` for an unknown way, or one that the bundle lacks."""
    if reuse is None:
        return None
    if reuse not in REUSE:
        raise CogumiError(f"unknown way to reuse answers '{reuse}': choose one of {', '.join(REUSE)}")
    if reuse != "exact" and embedder is None:
        raise CogumiError(f"{bundle.path} holds no embedder: only --reuse exact works with it")
    near = embedder if reuse != "exact" else None
    return AnswerCache(near, state / "answers" if state else None, verified=reuse == "verified")


def _examples(path: Path) -> dict[str, list[Pair]]:
    """The examples of a bundle by domain. Raises `BundleError` if a line is none."""
    found: dict[str, list[Pair]] = defaultdict(list)
    try:
        for line in path.read_text("utf-8").strip("\n").split("\n"):
            row = json.loads(line)
            found[row["domain"]].append((str(row["question"]), str(row["answer"])))
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{path} holds a line that is no example ({error!r}); build the bundle again") from error
    return found
