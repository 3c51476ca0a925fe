"""Rows about bundles of real shapes with synthetic weights: sizes on disk and in memory (SPEC D1, D10).

Every file has the size it would have with trained weights, and a question runs through all tiers: the draft reads it,
the base answers, the draft scores the answer, and a modifier answers again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cogumi.bundle.format import (
    BASE,
    CALIBRATION,
    CARD,
    CRITIC,
    DIFFICULTY,
    DRAFT,
    EMBEDDER,
    ESCALATION,
    INDEX,
    MODIFIERS,
    ROUTER,
    VOCABULARY,
    modifier_name,
    write_bundle,
)
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.gguf.type_mixture import stored_tensors
from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.critic_net import CriticNet, shapes
from cogumi.confidence.gate import TIERS, Calibration, Gate, QuestionGate
from cogumi.confidence.guarantee import Guarantee
from cogumi.confidence.nets import Net
from cogumi.confidence.policy import POLICIES
from cogumi.core.artifact import file_names
from cogumi.core.errors import RequestError
from cogumi.core.files import write_json, write_text
from cogumi.evaluate.bench.child_process import CascadeJob, CascadeResult, run_cascade
from cogumi.evaluate.bench.paired import Row, Setup
from cogumi.evaluate.bench.synthetic_models import SHAPES, digest, make_lora, make_weights

DOMAINS = ("code", "math", "tools")
RANK, ADAPTER_TYPE = 32, "q4_0"
CONTEXT, QUESTION, ANSWER = 2048, 128, 32
"""Tokens; the memory of the cache is allocated when it is opened."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Upper limits in bytes: file of the base, all files, resident memory."""

    base: int
    whole: int
    resident: int


WHOLE = Limits(545_000_000, 890_000_000, 1_500_000_000)
MOBILE = Limits(295_000_000, 295_000_000, 500_000_000)
EMBEDDER_SHAPE, ESCALATION_WIDTH = (30_522, 748), 90
"""Sizes of byte tables that make the files as large as the default nets."""


def bundle_1b(setup: Setup, type: str) -> Row:
    """A complete bundle with the widest 1B shape that fits, its draft and three modifiers."""
    base = widest(type, WHOLE.base)
    folder = make_bundle(setup.folder, base, type, replace(SHAPES["draft"], tied=True))
    return _row(f"bundle_1b_{type}", setup, folder, WHOLE, feed_forward=base.feed_forward)


def bundle_mobile(setup: Setup) -> Row:
    """A mobile package: the draft of such a bundle as base, with three modifiers."""
    folder = make_bundle(setup.folder, replace(SHAPES["draft"], tied=True), "q4_k_m", None)
    return _row("bundle_mobile", setup, folder, MOBILE)


def _row(name: str, setup: Setup, folder: Path, limits: Limits, **extra: Any) -> Row:
    """Resident bytes after an answer with repacked weights, against those without; a process for each."""
    results: dict[bool, CascadeResult] = {}
    for done, repack in enumerate((True, False), 1):
        job = CascadeJob(str(folder), setup.threads, "x" * QUESTION, ANSWER, CONTEXT, repack)
        results[repack] = run_cascade(job)
        setup.tick(done / 2)
    sizes = {name: (folder / name).stat().st_size for name in file_names(folder)}
    ours, plain = results[True], results[False]
    whole = sum(sizes.values())
    conditions = {
        "goal": f"<= {limits.whole / 1e6:g} MB on disk, <= {limits.resident / 1e6:g} MB in memory",
        "met": sizes[BASE] <= limits.base and whole <= limits.whole and ours.resident_bytes <= limits.resident,
        "base_bytes": sizes[BASE],
        "whole_bytes": whole,
        "modifier_bytes": sizes[modifier_name(DOMAINS[0])],
        "context": CONTEXT,
        "repacked": _rounded(ours),
        "mapped": _rounded(plain),
    }
    ratio = ours.resident_bytes / plain.resident_bytes
    return Row(name, ratio, ours.resident_bytes, plain.resident_bytes, "B", conditions | extra)


def _rounded(result: CascadeResult) -> dict[str, Any]:
    return {k: round(v, 2) if isinstance(v, float) else v for k, v in asdict(result).items()}


def widest(type: str, limit: int) -> Llama:
    """Llama-3.2-1B with a vocabulary of 32k and the widest feed-forward layers whose weights fit in `limit` bytes.

    The width is a multiple of 256 (a block). At Q4_K_M the full shape takes 639 MB. `RequestError` if none fits.
    """
    whole = replace(SHAPES["1b"], tied=True)
    for width in range(whole.feed_forward, 0, -256):
        shape = replace(whole, feed_forward=width)
        if sum(t.nbytes for t in stored_tensors(shape, type)) <= limit:
            return shape
    raise RequestError(f"no 1B shape of type {type} fits in {limit} bytes")


def make_bundle(folder: Path, base: Llama, type: str, draft: Llama | None) -> Path:
    """A bundle of these shapes in `folder`, made once; without `draft` a mobile package, whose base reads questions.

    Its router sends every question to the first of `DOMAINS`, and its gates accept no answer.
    """
    out = folder / f"bundle-{type}-{digest(base, draft, RANK, ADAPTER_TYPE, EMBEDDER_SHAPE, ESCALATION_WIDTH)}"
    if (out / INDEX).is_file():
        return out
    (out / MODIFIERS).mkdir(parents=True, exist_ok=True)
    os.replace(make_weights(folder, "base", base, type), out / BASE)
    if draft is not None:
        os.replace(make_weights(folder, "draft", draft, "q4_k_m"), out / DRAFT)
    for domain in DOMAINS:
        os.replace(make_lora(folder, domain, base, RANK, ADAPTER_TYPE), out / modifier_name(domain))
    _write_nets(out, (draft or base).hidden)
    files = {name: out / name for name in file_names(out)}
    parts = {n: {"base_fingerprint": "made-up", "tokenizer_sha256": "made-up"} for n in files if n.endswith(".gguf")}
    write_bundle(out, files, {"parts": parts})
    return out


def _write_nets(folder: Path, width: int) -> None:
    """Write the small parts, for a draft with hidden states of that width."""
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    save_file({"weight": np.zeros(width, np.float32), "bias": np.ones(1, np.float32)}, folder / DIFFICULTY)
    layers = [2 * width, 64, 32, 1 + len(DOMAINS)]
    weights = [np.zeros(pair) for pair in pairwise(layers)]
    biases = [np.zeros(n) for n in layers[1:-1]] + [np.array([0.0, 3.0, *(0.0 for _ in DOMAINS[1:])])]
    classes = ("base", *DOMAINS)
    Net.of(np.zeros(2 * width), np.ones(2 * width), weights, biases, classes).save(folder / ROUTER)
    critic = {name: draw.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes(16, 64).items()}
    CriticNet(critic, Calibrator("none")).save(folder / CRITIC)
    write_json(folder / CALIBRATION, _calibration().to_json())
    _escalation(folder / ESCALATION)
    _embedder(folder / EMBEDDER, folder / VOCABULARY)
    write_text(folder / CARD, "# Synthetic weights in real shapes\n")


def _calibration() -> Calibration:
    """Gates that accept no answer."""
    gate = Gate(("mean_logprob",), Net.of([0], [1], [[[0.0]]], [[0.0]]), Calibrator("none"))
    promise = Guarantee(0.9, 0.05, 0.95, 100, 50, 0, 0.05)
    names = [policy.name for policy in POLICIES]
    question = QuestionGate(1e9, 0.5)
    return Calibration(
        question, dict.fromkeys(TIERS, gate), None, 30.0, dict.fromkeys(names, promise), dict.fromkeys(names, 0.9)
    )


def _onnx(path: Path, nodes: Sequence[Any], inputs: Sequence[str], output: tuple[str, list[Any]], **more: Any) -> None:
    """Write a graph on token ids [1, tokens] to a file."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    ids = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "tokens"]) for name in inputs]
    result = helper.make_tensor_value_info(output[0], TensorProto.FLOAT, output[1])
    kept = [numpy_helper.from_array(values, name) for name, values in more["values"].items()]
    graph = helper.make_graph(list(nodes), "made-up", ids, [result], kept)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, more.get("metadata", {}))
    onnx.save(model, path)


def _embedder(model: Path, vocabulary: Path) -> None:
    """Write an encoder that returns the mean of synthetic word vectors."""
    from onnx import TensorProto, helper
    from tokenizers import Tokenizer, models

    table = np.random.default_rng(0).integers(-9, 9, EMBEDDER_SHAPE).astype(np.int8)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["vector"], axes=[1], keepdims=0),
    ]
    _onnx(model, nodes, ["ids"], ("vector", [1, EMBEDDER_SHAPE[1]]), values={"table": table})
    words = {"[UNK]": 0} | {f"word{i}": i for i in range(1, EMBEDDER_SHAPE[0])}
    Tokenizer(models.WordLevel(words, unk_token="[UNK]")).save(str(vocabulary))


def _escalation(path: Path) -> None:
    """Write a classifier that never finds a user dissatisfied."""
    from onnx import TensorProto, helper

    from cogumi.cascade.dissatisfaction import describe

    table = np.zeros((EMBEDDER_SHAPE[0], ESCALATION_WIDTH), np.int8)
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], axes=[1, 2], keepdims=0),
        helper.make_node("Add", ["mean", "nothing"], ["p"]),
    ]
    values = {"table": table, "nothing": np.zeros(1, np.float32)}
    _onnx(path, nodes, ["ids", "marks"], ("p", [1]), values=values, metadata=describe(["made"], 0.5, 0.9))
