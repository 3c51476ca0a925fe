"""Stage `router`: the domain router (SPEC F5), a net in -> 64 -> 32 -> classes on the draft's hidden states.

Its classes are all domains of the training split. At run time the base answers questions of domains without a modifier
(`confidence.domain_router`), and out-of-scope questions: those whose highest class probability is below `scope`. This
threshold is set on the selection split at a given false-alarm rate and stored in the net's file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cogumi.cascade.tiers import router_input
from cogumi.confidence.domain_router import confidences, scope_for
from cogumi.confidence.nets import Net
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize, ModelFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.teach.context_size import context_for
from cogumi.train.fit_classifier import fit_classifier

VERSION = 4
KIND = "router"
INPUTS = {"draft_gguf": "gguf", "data": "examples"}
FILE = "router.safetensors"
CLASSES = 6
"""Assumed number of domains in estimates; each further domain adds 132 bytes."""


class Config(BaseModel):
    """`rows` of the training split to train on; `context`: most tokens of a question (None: those of the
    longest); `false_alarms`: share of known
    questions that may count as out of scope.
    """

    model_config = ConfigDict(extra="forbid")
    rows: int = Field(4000, ge=1)
    epochs: int = Field(40, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")
    false_alarms: float = Field(0.02, ge=0, lt=1)


def train(x: NDArray[np.float64], domains: Sequence[str], epochs: int, seed: int) -> Net:
    """A classifier of vectors [n, in] by domain. Raises `DataError` for fewer than two domains."""
    return Net.of(*fit_classifier(x, domains, epochs, seed))


def estimate(config: Config, given: Given) -> Estimate:
    """The file of the net: a safetensors header and fp32 weights, with an input twice as wide as the draft."""
    draft = given.find("draft_gguf", ModelFacts)
    if draft is None:
        return Estimate()
    width = 2 * draft.shape.hidden
    layers = ((width, 64), (64, 32), (32, CLASSES))
    weights = 2 * width + 1 + sum(into * out + out for into, out in layers)
    return Estimate((FileFacts({FILE: FileSize(4 * weights + 712)}),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`draft_gguf` (model.gguf) and `data` (examples) -> router.safetensors; accuracy on the selection split."""
    data = inputs["data"].path
    splits = {name: read_examples(split_path(data, name)) for name in ("train", "selection")}
    splits["train"] = splits["train"][: config.rows]
    path = inputs["draft_gguf"].path / "model.gguf"
    size = context_for([path], [e for examples in splits.values() for e in examples], 0, config.context)
    draft = LlamaEngine(path, slots=1, context=size, lookup=False)
    try:
        total, done, features = sum(map(len, splits.values())), 0, {}
        for name, examples in splits.items():
            rows = []
            for example in examples:  # one at a time, because batching would change the bytes
                rows.append(router_input(draft.read(Request(messages=example.messages))))
                done += 1
                context.progress(done, total, {})
            features[name] = np.array(rows)
    finally:
        draft.close()
    net = train(features["train"], [e.domain for e in splits["train"]], config.epochs, context.seed)
    scope = scope_for(confidences(net, features["selection"]), config.false_alarms)
    net.save(out / FILE, scope=scope)
    return {
        "rows": len(splits["train"]),
        "classes": list(net.classes),
        "scope": scope,
        "false_alarms": config.false_alarms,
        **_accuracy(net, features["selection"], splits["selection"]),
    }


def _accuracy(net: Net, x: NDArray[np.float64], examples: Sequence[Example]) -> dict[str, Any]:
    hits: dict[str, list[bool]] = {}
    for row, example in zip(x, examples, strict=True):
        p = net.probabilities(row)
        hits.setdefault(example.domain, []).append(max(p, key=lambda name: p[name]) == example.domain)
    every = [hit for domain in hits.values() for hit in domain]
    return {
        "accuracy": float(np.mean(every)) if every else None,
        "by_domain": {domain: float(np.mean(found)) for domain, found in sorted(hits.items())},
    }
