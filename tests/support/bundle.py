"""A complete bundle of pico models for tests: random weights in real files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from cogumi.bundle.format import (
    BASE,
    CALIBRATION,
    CARD,
    DIFFICULTY,
    DRAFT,
    ROUTER,
    modifier_name,
    open_bundle,
    write_bundle,
)
from cogumi.cascade.cascade import Cascade
from cogumi.cascade.history import History
from cogumi.cascade.services import Services
from cogumi.cascade.tiers import Heads, Tiers
from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.gate import TIERS, Calibration, Gate, QuestionGate
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import Net, load_head, load_net
from cogumi.confidence.policy import POLICIES
from cogumi.core.files import write_json, write_text
from cogumi.engine.llama.engine import LlamaEngine
from support.pico import make_adapter, make_model

DOMAINS = ("code", "math")
HIDDEN = 64


def make_bundle(folder: Path) -> Path:
    """Write a bundle into `folder / "bundle"`: base, draft and a modifier for each of `DOMAINS`.

    Every answer has P(correct) 0.7: enough for the threshold of mode fast, too little where modifiers may answer.
    The router assigns every question to the first domain.
    """
    base, draft = make_model(folder / "base"), make_model(folder / "draft", layers=1, perturb=0.05)
    export_model(base, folder / BASE)
    export_model(draft, folder / DRAFT)
    files = {BASE: folder / BASE, DRAFT: folder / DRAFT}
    for seed, domain in enumerate(DOMAINS):
        adapter = make_adapter(folder / domain, base, seed=seed)
        files[modifier_name(domain)] = folder / f"{domain}.gguf"
        export_adapter(adapter, base, folder / f"{domain}.gguf")
    zeros = np.zeros(HIDDEN, np.float32)
    save_file({"weight": zeros, "bias": np.ones(1, np.float32)}, folder / DIFFICULTY)
    width = 2 * HIDDEN
    classes = ("base", *DOMAINS)
    Net.of(np.zeros(width), np.ones(width), [np.zeros((width, 3))], [[0.0, 3.0, 0.0]], classes).save(folder / ROUTER)
    names = ("mean_logprob", *(f"domain_{name}" for name in classes))
    gate = Gate(names, Net.of(np.zeros(4), np.ones(4), [np.zeros((4, 1))], [[np.log(0.7 / 0.3)]]), Calibrator("none"))
    thresholds = {policy.name: 0.9 if policy.modifier else 0.5 for policy in POLICIES}
    guarantees = {name: Guarantee(t, 0.05, 0.95, 100, 50, 0, 0.05) for name, t in thresholds.items()}
    gates = dict.fromkeys(TIERS, gate)
    calibration = Calibration(QuestionGate(1e9, 0.5), gates, None, 30.0, guarantees, thresholds)
    write_json(folder / CALIBRATION, calibration.to_json())
    write_text(folder / CARD, "# A pico bundle\n")
    files |= {name: folder / name for name in (DIFFICULTY, ROUTER, CALIBRATION, CARD)}
    parts = {n: {"base_fingerprint": "base", "tokenizer_sha256": "one"} for n in files if n.endswith(".gguf")}
    write_bundle(folder / "bundle", files, {"parts": parts})
    return folder / "bundle"


def open_tiers(bundle: Path, slots: int, context: int) -> Tiers:
    """The models of such a bundle, one thread each."""
    files, size = open_bundle(bundle), {"slots": slots, "context": context, "threads": 1}
    return Tiers(
        LlamaEngine(files.base, draft=files.draft, adapters=files.modifiers, **size),
        LlamaEngine(files.draft, lookup=False, **size),
        Heads(load_head(files.difficulty), load_net(files.router)),
    )


def sure(p: float) -> Gate:
    """A gate that gives every answer the probability `p`."""
    return Gate(("mean_logprob",), Net.of([0], [1], [[[0.0]]], [[math.log(p / (1 - p))]]), Calibrator("none"))


def calibrated(gates: Mapping[str, float | None], threshold: float, question: QuestionGate) -> Calibration:
    """A calibration whose gates give every answer one probability (None: no gate), with one threshold for all."""
    promise = Guarantee(threshold, 0.05, 0.95, 100, 50, 0, 0.05)
    names = [policy.name for policy in POLICIES]
    kept = {name: sure(p) for name, p in gates.items() if p is not None}
    return Calibration(question, kept, None, 30.0, dict.fromkeys(names, promise), dict.fromkeys(names, 0.7))


def cascade_of(tiers, calibration, *, workers=2, queue=1000, memory=None, cache=None, **services) -> Cascade:
    """A cascade over tiers that the caller closes."""
    history = History(memory, None, cache, gate=services.get("gate", "calibrated"))
    return Cascade(Services(tiers, calibration, history=history, **services), workers=workers, queue=queue)
