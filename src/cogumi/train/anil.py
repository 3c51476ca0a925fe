"""Stage `anil`: a model that learns new tasks from a few examples (SPEC C2).

The outer loop, the shared one, trains a LoRA on the layers and the start of a LoRA on the head. Methods:

anil    the inner loop adapts the head on an episode's support set; the outer loss is that of its query set
fomaml  the inner loop adapts the whole LoRA on the layers; there is none on the head
plain   no inner loop: the control, taught all examples of the same episodes
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import AdapterFacts, ModelFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.episodes import Episode, read_episodes
from cogumi.models import head_adaptation as heads
from cogumi.models.answer_match import exact
from cogumi.models.folders import load
from cogumi.models.head_adaptation import Head, Rates
from cogumi.models.inner_loop import adapt_weights, shot, states, weights_of
from cogumi.models.lora import LoraShape, attach, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.training_cost import training_estimate

VERSION = 1
KIND = "adapter"
INPUTS = {"episodes": "episodes", "model": "model"}
TRAINS = True

TRIED: Mapping[str, Rates] = {
    "v2": Rates(lr=1e-5, steps=1),
    "5e-3 x 3": Rates(lr=5e-3, steps=3),
    "0.05": Rates(lr=0.05, steps=1),
}
"""Rates of the documents and two larger ones: how far each moves a logit is among the metrics."""

_JUDGED_AT_ONCE = 8

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"loop": {"steps": 300, "batch": 8, "lr": 3e-3, "evaluate_every": 50}},
    "v2": {
        "lora": {"rank": 16, "alpha": 32},
        "head_rank": 16,
        "head_alpha": 32,
        "inner": {"lr": 1e-5, "steps": 1},
        "support": 4,
        "query": 4,
        "loop": {"lr": 3e-6, "batch": 16, "accumulate": 8, "clip": 0.5},
    },
    "fomaml": {
        "method": "fomaml",
        "lora": {"rank": 48, "alpha": 48, "targets": ("q_proj", "v_proj")},
        "inner": {"lr": 1.0, "steps": 3},
        "support": 8,
        "query": 12,
        "loop": {"steps": 60, "batch": 8, "lr": 3e-3, "evaluate_every": 30},
    },
}
"""Settings by name; what a recipe sets beside the preset wins. `v2` are the documents' corrected rates."""


class Config(BaseModel):
    """`inner` are the rates of the inner loop; `support` and `query` bound the examples taken of an episode."""

    model_config = ConfigDict(extra="forbid")
    preset: Literal["tiny", "v2", "fomaml"] = "tiny"
    method: Literal["anil", "fomaml", "plain"] = "anil"
    lora: LoraShape = LoraShape(rank=16, alpha=32)
    head_rank: int = Field(16, ge=1)
    head_alpha: float = Field(32, gt=0)
    inner: Rates = Rates(lr=0.1, steps=20)
    support: int = Field(5, ge=1)
    query: int = Field(10, ge=1)
    loop: LoopConfig

    @model_validator(mode="before")
    @classmethod
    def _under_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("preset", "tiny") not in PRESETS:
            return given
        chosen = PRESETS[given.get("preset", "tiny")]
        merged = {**chosen, **given}
        for name in ("lora", "inner", "loop"):
            if isinstance(given.get(name), Mapping) and name in chosen:
                merged[name] = {**chosen[name], **given[name]}
        return merged


@dataclass(frozen=True, slots=True)
class Task:
    """An episode as tokens."""

    id: str
    support: tuple[Row, ...]
    query: tuple[Row, ...]

    @property
    def size(self) -> int:
        """Tokens that are read."""
        return sum(len(s.ids) for s in (*self.support, *self.query))

    @property
    def weight(self) -> int:
        """Answer tokens of the query set."""
        return sum(len(s.ids) - s.start for s in self.query)


@dataclass(frozen=True, slots=True)
class Tasks:
    """A batch of episodes; they become tensors where the model is."""

    tasks: tuple[Task, ...]
    index: Tensor

    def to(self, device: torch.device) -> Self:
        """Itself."""
        return self


def choose(tasks: Sequence[Task], index: Sequence[int]) -> Tasks:
    """The chosen episodes as one batch."""
    return Tasks(tuple(tasks[i] for i in index), torch.tensor(list(index)))


class Learner(nn.Module):
    """A language model under a LoRA, and the start of a LoRA on its head."""

    def __init__(self, lm: Any, start: Head) -> None:
        super().__init__()
        self.lm = lm
        self.head_a, self.head_b = nn.Parameter(start.a), nn.Parameter(start.b)
        self.scale = start.scale

    @property
    def head(self) -> Head:
        """The start of the inner loop."""
        return Head(self.head_a, self.head_b, self.scale)


def adapted(model: Any, batch: Tasks, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """What the model says of the query sets' answer tokens after the inner loop: logits `[n, vocabulary]`, the tokens
    and whose they are `[n]`.

    The inner loop adapts the head of a `Learner`, or else all trained weights of the layers.
    """
    found = (_by_head if isinstance(model, Learner) else _by_weights)(model, batch, rates)
    starts = torch.tensor([0, *(len(task.query) for task in batch.tasks)]).cumsum(0).tolist()
    rows = [row + start for (_, _, row), start in zip(found, starts, strict=False)]
    return torch.cat([logits for logits, _, _ in found]), torch.cat([t for _, t, _ in found]), torch.cat(rows)


def _by_head(model: Learner, batch: Tasks, rates: Rates) -> list[tuple[Tensor, Tensor, Tensor]]:
    with torch.no_grad():
        given, whose = states(model.lm, [s for task in batch.tasks for s in task.support])
    asked, row = states(model.lm, [s for task in batch.tasks for s in task.query])
    found, support_at, query_at = [], 0, 0
    for task in batch.tasks:
        mine = (whose >= support_at) & (whose < support_at + len(task.support))
        here = (row >= query_at) & (row < query_at + len(task.query))
        query = asked.where(here)
        head = heads.adapt(model.head, given.where(mine), rates)
        found.append((heads.logits(head, query), query.targets, row[here] - query_at))
        support_at, query_at = support_at + len(task.support), query_at + len(task.query)
    return found


def _by_weights(model: Any, batch: Tasks, rates: Rates) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for task in batch.tasks:
        asked, row = states(model, task.query, adapt_weights(model, weights_of(model), task.support, rates))
        found.append((asked.base, asked.targets, row))
    return found


def outer_loss(model: Any, batch: Tasks, rates: Rates) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token of the query sets, after the inner loop."""
    logits, targets, _ = adapted(model, batch, rates)
    loss = cross_entropy(logits, targets)
    return loss, {"loss": float(loss.detach())}


def plain_loss(model: Learner, batch: Tasks) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token of all examples, without an inner loop."""
    seen, _ = states(model.lm, [s for task in batch.tasks for s in (*task.support, *task.query)])
    loss = cross_entropy(heads.logits(model.head, seen), seen.targets)
    return loss, {"loss": float(loss.detach())}


def judge(apply: Apply, tasks: Sequence[Task], rates: Rates) -> dict[str, float]:
    """`loss` (nats per answer token of the query sets after adaptation) and `exact` (answers right word for word)."""
    nats = right = 0.0
    for at in range(0, len(tasks), _JUDGED_AT_ONCE):
        batch = choose(tasks, range(at, min(at + _JUDGED_AT_ONCE, len(tasks))))
        logits, targets, row = apply(partial(adapted, rates=rates), batch)
        nats += float(cross_entropy(logits, targets, reduction="sum"))
        right += float(exact(logits, targets, row, sum(len(task.query) for task in batch.tasks)).sum())
    asked = sum(len(task.query) for task in tasks)
    return {"loss": nats / sum(task.weight for task in tasks), "exact": right / asked}


def tasks_of(episodes: Sequence[Episode], tokenizer: HFTokenizer, context: int, config: Config) -> list[Task]:
    """Episodes as tokens, no more of their examples than the configuration takes; `DataError` if one is too long."""
    return [
        Task(
            episode.id,
            tuple(shot(e, tokenizer, context) for e in episode.support[: config.support]),
            tuple(shot(e, tokenizer, context) for e in episode.query[: config.query]),
        )
        for episode in episodes
    ]


@torch.no_grad()
def logit_changes(model: Learner, task: Task, config: Config) -> dict[str, float]:
    """How far one adaptation moves any logit of a query set, by rates."""
    given, asked = (states(model.lm, shots)[0] for shots in (task.support, task.query))
    rates = {**TRIED, "inner": config.inner}
    return {name: heads.logit_change(model.head, given, asked, tried) for name, tried in rates.items()}


def estimate(config: Config, given: Given) -> Estimate:
    """The adapter, and what its training takes without the inner loop."""
    head = 0 if config.method == "fomaml" else config.head_rank
    adapter, model = AdapterFacts(config.lora.by_target, head), given.find("model", ModelFacts)
    if model is None:
        return Estimate((adapter,))
    return replace(training_estimate(given, model, config.loop, config.lora, merged=False), facts=(adapter,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`episodes` and `model` (the base) -> a PEFT folder; `head.safetensors` beside it, where there is a head."""
    torch.set_num_threads(context.threads)
    base = inputs["model"].path
    tokenizer, lm = HFTokenizer.load(base), load(base)
    room = lm.config.max_position_embeddings
    taught, judging = (
        tasks_of(read_episodes(inputs["episodes"].path, name), tokenizer, room, config)
        for name in ("train", "selection")
    )
    vocabulary, width = lm.lm_head.weight.shape
    start = heads.fresh(config.head_rank, config.head_alpha, width, vocabulary, context.seed)
    lm = attach(lm, config.lora, context.seed)
    model = lm if config.method == "fomaml" else Learner(lm, start)
    changes = logit_changes(model, judging[0], config) if isinstance(model, Learner) else {}
    at = train(
        model,
        taught,
        plain_loss if config.method == "plain" else partial(outer_loss, rates=config.inner),
        config.loop,
        out,
        context,
        lambda apply: judge(apply, judging, config.inner),
        choose,
    )
    save(lm, out)
    base_sha256 = sha256(base / "model.safetensors")
    if isinstance(model, Learner):
        heads.save(model.head, config.inner, base_sha256, out / heads.FILE)
    return {
        "method": config.method,
        "inner": config.inner.model_dump(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "episodes": len(taught),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        "largest_logit_change": changes,
        "curve": {"training": at.losses, "selection": at.validations},
        "base_sha256": base_sha256,
    }
