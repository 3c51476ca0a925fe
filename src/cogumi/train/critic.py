"""Stage `critic`: a net that scores answers and classifies their errors (SPEC F14), trained on graded answers.

The exported base and its modifiers answer training questions, greedily and sampled, so that there are better and worse
answers to the same question; graders label them. The epoch is chosen, and the probabilities are calibrated (Platt), on
answers to the selection split. `error_type` derives the class of an error from the grader's verdict, the check and the
text.
"""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from cogumi.cascade.self_consistency import SAMPLING
from cogumi.confidence import calibrators
from cogumi.confidence.calibrators import Calibrator
from cogumi.confidence.critic_net import (
    BUCKETS,
    CLASSES,
    FILE,
    NONE,
    CriticInput,
    CriticNet,
    correct_logit,
    critic_input,
    shapes,
)
from cogumi.confidence.metrics import auroc
from cogumi.confidence.signals import abstains
from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize
from cogumi.core.stage import Context
from cogumi.core.text import last_user_message
from cogumi.core.types import Artifact, Example, Reply, Request
from cogumi.data.examples import read_examples, split_path
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Engine, replies
from cogumi.grading.graders import grade_all
from cogumi.grading.option_choice import chosen
from cogumi.grading.programs import programs
from cogumi.grading.quantities import committed
from cogumi.grading.tool_calls import Call, calls_in, calls_of
from cogumi.teach.context_size import context_for
from cogumi.teach.tier_answers import AskOptions

VERSION = 4
KIND = "critic"
INPUTS = {"data": "examples", "base": "gguf"}
OPTIONAL = {"modifier_*": "gguf"}
MODIFIER = "modifier_"


class Config(BaseModel):
    """`rows`: number of training questions to answer, `selection`: number of selection questions; `width` of embeddings
    and `hidden` layers; `unknown`: rate of word dropout.
    """

    model_config = ConfigDict(extra="forbid")
    rows: int = Field(4000, ge=1)
    selection: int = Field(600, ge=1)
    width: int = Field(16, ge=1)
    hidden: int = Field(64, ge=1)
    epochs: int = Field(15, ge=1)
    batch: int = Field(128, ge=1)
    lr: float = Field(5e-3, gt=0)
    unknown: float = Field(0.1, ge=0, lt=1)
    max_tokens: int = Field(64, ge=1)
    slots: int = Field(16, ge=1)
    context: int | None = Field(None, ge=16, description="tokens of question and answer; none: the longest")


@dataclass(frozen=True, slots=True)
class LabelledAnswer:
    """An answer with its label `error`, one of `confidence.critic_net.CLASSES`."""

    example: Example
    reply: Reply
    error: str

    @property
    def seen(self) -> CriticInput:
        """The critic's input."""
        return critic_input(question_of(self.example), self.reply)


def question_of(example: Example) -> str:
    """The text of the last user message."""
    return last_user_message(example.messages)


def error_type(example: Example, reply: Reply, correct: bool) -> str:
    """The error class of an answer, or "none" if it is correct. The first rule that applies decides:

    an answer to an unanswerable question -> hallucination; a truncated or empty answer or an abstention -> incomplete;
    an answer without a number, a choice or a tool call where one is asked for, code that does not parse -> format; a
    wrong number -> calculation; code that fails its tests -> code logic; tool calls with too few arguments, in whatever
    prose they stand -> incomplete, with values that the question does not contain -> hallucination; a text that the
    question does not contain although it contains the right answer -> hallucination; all others -> logic.
    """
    text, check = reply.text, example.check
    kind, question = check["kind"], question_of(example).casefold()
    if correct:
        return NONE
    if kind == "abstain":
        return "hallucination"
    if reply.finish_reason == "length" or not text.strip() or abstains(text):
        return "incomplete"
    if kind == "numeric":
        return "format" if committed(text) is None else "calculation"
    if kind == "code":
        return "code logic" if _parses(programs(text)[0]) else "format"
    if kind == "choice":
        return "format" if chosen(text, check.get("options", [])) is None else "logic"
    if kind == "tool_call":
        return _call_error(text, example, question)
    invented = example.answer.casefold() in question and text.strip(" .\"'").casefold() not in question
    return "hallucination" if invented else "logic"


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _call_error(text: str, example: Example, question: str) -> str:
    try:
        calls = calls_in(text)
    except (ValueError, RecursionError):
        return "format"
    found = _values(calls)
    if not found:
        return "format"
    if len(found) < _fewest_values(example):
        return "incomplete"
    return "hallucination" if any(value.casefold() not in question for value in found) else "logic"


def _fewest_values(example: Example) -> int:
    """Number of names and argument values that the right calls have at least."""
    check = example.check
    if "possible" in check:  # an argument that may be "" may be left out
        calls = [values for call in check["possible"] for values in call.values()]
        return sum(1 + sum("" not in possible for possible in values.values()) for values in calls)
    return len(_values(calls_of(check["call"] if "call" in check else json.loads(example.answer))))


def _values(calls: Sequence[Call]) -> list[str]:
    return _leaves([[call.tool, dict(call.arguments)] for call in calls])


def _leaves(value: Any) -> list[str]:
    if isinstance(value, (dict, list)):
        items = value.values() if isinstance(value, dict) else value
        return [leaf for item in items for leaf in _leaves(item)]
    return [str(value)]


def labelled_answers(
    engine: Engine, examples: Sequence[Example], options: AskOptions, seed: int
) -> list[LabelledAnswer]:
    """A greedy and a sampled answer to each example by the base, and by the modifier of its domain if there is one."""
    jobs: list[tuple[Example, Request]] = []
    for adapter in (None, *engine.adapters):
        for i, example in enumerate(examples):
            if adapter in (None, example.domain):
                limit = options.max_tokens
                greedy = Request(messages=example.messages, max_tokens=limit, adapter=adapter, speculate=False)
                sampled = SAMPLING.requests(replace(greedy, seed=seed + i), 1)
                jobs += [(example, request) for request in (greedy, *sampled)]
    found = []
    for reply in replies(engine, [request for _, request in jobs], options.window):
        found.append(reply)
        if len(found) % 100 == 0:
            options.progress(len(found), len(jobs), {})
    verdicts = grade_all([(example, reply.text) for (example, _), reply in zip(jobs, found, strict=True)])
    return [
        LabelledAnswer(example, reply, error_type(example, reply, verdict.correct))
        for (example, _), reply, verdict in zip(jobs, found, verdicts, strict=True)
    ]


class TrainableCritic(nn.Module):
    """`confidence.critic_net.CriticNet` in torch: the same weights under the same names."""

    embedding: Tensor
    known: Tensor
    feature_mean: Tensor
    feature_scale: Tensor
    summary_mean: Tensor
    summary_scale: Tensor
    token_weight: Tensor
    token_bias: Tensor
    attention: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor

    def __init__(self, config: Config, rows: Sequence[CriticInput]) -> None:
        super().__init__()
        self.unknown = config.unknown
        for name, shape in shapes(config.width, config.hidden).items():
            bound = shape[0] ** -0.5 if name.endswith("weight") or name == "attention" else 0.0
            self.register_parameter(name, nn.Parameter(torch.empty(shape).uniform_(-bound, bound)))
        for name, values in (
            ("feature", np.concatenate([row.features for row in rows])),
            ("summary", np.array([row.summary for row in rows])),
        ):
            for part, moment in (("mean", values.mean(axis=0)), ("scale", np.maximum(values.std(axis=0), 1e-3))):
                setattr(self, f"{name}_{part}", nn.Parameter(torch.from_numpy(moment), requires_grad=False))
        known = np.zeros(BUCKETS, np.float32)
        known[np.concatenate([bucket for row in rows for bucket in (row.question, row.words)])] = 1.0
        self.known = nn.Parameter(torch.from_numpy(known), requires_grad=False)

    def _embed(self, buckets: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings [rows, words, width] and mask [rows, words, 1]; 0 for padding (-1), unknown and dropped words."""
        known = (buckets >= 0) & (self.known[buckets.clamp(min=0)] > 0)
        if self.training:
            known = known & (torch.rand(buckets.shape) >= self.unknown)
        mask = known[..., None].float()
        return self.embedding[buckets.clamp(min=0)] * mask, mask

    def forward(self, question: Tensor, words: Tensor, features: Tensor, summary: Tensor) -> Tensor:
        """Buckets [rows, m] and [rows, n] padded with -1, features [rows, n, F], summary [rows, S] -> logits."""
        rows, mask = self._embed(question)
        asked = rows.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        around = nn.functional.pad(self._embed(words)[0], (0, 0, 1, 1))
        scaled = (features - self.feature_mean) / self.feature_scale
        repeated = asked[:, None].expand(-1, words.shape[1], -1)
        x = torch.cat([scaled, around[:, 1:-1], around[:, :-2], around[:, 2:], repeated], dim=2)
        h = torch.relu(x @ self.token_weight + self.token_bias)
        weights = (h @ self.attention).masked_fill(words < 0, -torch.inf).softmax(dim=1)
        pooled = (weights[..., None] * h).sum(dim=1)
        scaled_summary = (summary - self.summary_mean) / self.summary_scale
        u = torch.relu(torch.cat([pooled, asked, scaled_summary], dim=1) @ self.hidden_weight + self.hidden_bias)
        logits: Tensor = u @ self.out_weight + self.out_bias
        return logits

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """A copy of the weights as arrays."""
        return {name: value.detach().numpy().copy() for name, value in self.named_parameters()}


def _batch(rows: Sequence[CriticInput]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def padded(arrays: Sequence[NDArray[Any]], filling: float) -> Tensor:
        return pad_sequence([torch.from_numpy(a) for a in arrays], batch_first=True, padding_value=filling)

    return (
        padded([r.question for r in rows], -1),
        padded([r.words for r in rows], -1),
        padded([r.features for r in rows], 0.0),
        torch.from_numpy(np.array([r.summary for r in rows])),
    )


def train(rows: Sequence[LabelledAnswer], selection: Sequence[LabelledAnswer], config: Config, seed: int) -> CriticNet:
    """The critic of the epoch with the lowest loss on `selection`, calibrated there."""
    torch.manual_seed(seed)
    training, target = [r.seen for r in rows], _classes(rows)
    others, labels = [r.seen for r in selection], _classes(selection)
    net = TrainableCritic(config, training)
    steps = config.epochs * -(-len(training) // config.batch)
    learned = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=steps)
    best, lowest, validation = net.weights(), math.inf, _batch(others)
    for _ in range(config.epochs):
        net.train()
        order = torch.randperm(len(training))
        for start in range(0, len(training), config.batch):
            index = order[start : start + config.batch]
            loss = nn.functional.cross_entropy(net(*_batch([training[int(i)] for i in index])), target[index])
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
        net.eval()
        with torch.no_grad():
            current = float(nn.functional.cross_entropy(net(*validation), labels))
        if current < lowest:
            best, lowest = net.weights(), current
    raw = CriticNet(best, Calibrator("none"))
    z = np.array([correct_logit(raw.logits(one)[0]) for one in others])
    return CriticNet(best, calibrators.fit("platt", z, labels.numpy() == 0))


def _classes(rows: Sequence[LabelledAnswer]) -> Tensor:
    return torch.tensor([CLASSES.index(row.error) for row in rows])


def figures(net: CriticNet, rows: Sequence[LabelledAnswer]) -> dict[str, Any]:
    """AUROC of P(correct), and the accuracy of the error class on wrong answers."""
    opinions = [net.judge(row.seen) for row in rows]
    named = [opinion.error == row.error for opinion, row in zip(opinions, rows, strict=True) if row.error != NONE]
    return {
        "n": len(rows),
        "wrong": len(named),
        "auroc": auroc([opinion.p_correct for opinion in opinions], [row.error == NONE for row in rows]),
        "error_accuracy": float(np.mean(named)) if named else None,
    }


def estimate(config: Config, given: Given) -> Estimate:
    """The file of the net, with its size in the recipe tiny."""
    return Estimate((FileFacts({FILE: FileSize(602_420, 0.11)}),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`data` (examples), `base` (model.gguf), any `modifier_<domain>` (adapter.gguf) -> critic.safetensors.

    The figures are measured on the selection split, on which the epoch was chosen.
    """
    torch.set_num_threads(1)  # with several threads the order of sums, and so the result, varies
    folder = inputs["data"].path
    splits = [
        read_examples(split_path(folder, name))[:rows]
        for name, rows in (("train", config.rows), ("selection", config.selection))
    ]
    adapters = {
        role.removeprefix(MODIFIER): artifact.path / "adapter.gguf"
        for role, artifact in inputs.items()
        if role.startswith(MODIFIER)
    }
    model = inputs["base"].path / "model.gguf"
    size = context_for([model], [e for split in splits for e in split], config.max_tokens, config.context)
    engine = LlamaEngine(model, adapters=adapters, lookup=False, slots=config.slots, context=size)
    options = AskOptions(config.max_tokens, 2 * config.slots, context.progress)
    try:
        training, selection = (labelled_answers(engine, split, options, context.seed) for split in splits)
    finally:
        engine.close()
    if not training or not selection:
        raise DataError("a critic needs questions in the splits 'train' and 'selection'; one is empty")
    net = train(training, selection, config, context.seed)
    net.save(out / FILE)
    errors = Counter(row.error for row in training)
    return {
        "rows": len(training),
        "errors": {name: errors[name] for name in CLASSES},
        **figures(net, selection),
        "bytes": (out / FILE).stat().st_size,
    }
