"""Stage `anil`: meta-learning of a model that adapts to new tasks from a few examples (SPEC C2).

The outer loop is `train.loop`; it trains a LoRA on the layers and the initial values of a LoRA on the head. Methods:

anil    the inner loop adapts the head to an episode's support set; the outer loss is that of its query set
fomaml  the inner loop adapts the LoRA on the layers; the head has no LoRA
plain   the control without an inner loop, trained on all examples of the same episodes
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
from cogumi.core.model_fingerprint import model_fingerprint
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.episodes import Episode, read_episodes
from cogumi.models import head_adaptation as heads
from cogumi.models.answer_match import exact
from cogumi.models.folders import load
from cogumi.models.head_adaptation import Head, Rates
from cogumi.models.inner_loop import adapt_weights, example_row, states, weights_of
from cogumi.models.lora import LoraShape, attach, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.loop import Apply, LoopConfig, train
from cogumi.train.training_cost import training_estimate

VERSION = 1
KIND = "adapter"
INPUTS = {"episodes": "episodes", "model": "model"}
TRAINS = True

COMPARED_RATES: Mapping[str, Rates] = {
    "v2": Rates(lr=1e-5, steps=1),
    "5e-3 x 3": Rates(lr=5e-3, steps=3),
    "0.05": Rates(lr=0.05, steps=1),
}
"""Rates of the specification and two larger ones; the metrics report the largest logit change with each."""

_EPISODES_PER_PASS = 8

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
"""Settings by name; values of the recipe override them. `v2` are the specification's corrected rates."""


class Config(BaseModel):
    """`inner` are the rates of the inner loop; `support` and `query` limit the examples used per episode."""

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
    def _with_preset(cls, given: Any) -> Any:
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
        """Number of tokens."""
        return sum(len(s.ids) for s in (*self.support, *self.query))

    @property
    def weight(self) -> int:
        """Answer tokens of the query set."""
        return sum(len(s.ids) - s.start for s in self.query)


@dataclass(frozen=True, slots=True)
class Tasks:
    """A batch of episodes; `states` makes the tensors, on the model's device."""

    tasks: tuple[Task, ...]
    index: Tensor

    def to(self, device: torch.device) -> Self:
        """The batch itself, which holds no tensors to move."""
        return self


def choose(tasks: Sequence[Task], index: Sequence[int]) -> Tasks:
    """The episodes of an index as one batch."""
    return Tasks(tuple(tasks[i] for i in index), torch.tensor(list(index)))


class Learner(nn.Module):
    """A language model with a LoRA on its layers, and the initial values of a LoRA on its head."""

    def __init__(self, lm: Any, start: Head) -> None:
        super().__init__()
        self.lm = lm
        self.head_a, self.head_b = nn.Parameter(start.a), nn.Parameter(start.b)
        self.scale = start.scale

    @property
    def head(self) -> Head:
        """The head from which the inner loop starts."""
        return Head(self.head_a, self.head_b, self.scale)


def adapted(model: Any, batch: Tasks, rates: Rates) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[n, vocabulary]`, ids and row numbers `[n]` of the query sets' answer tokens after the inner loop.

    The inner loop adapts the head of a `Learner`; of other models the trained weights of the layers.
    """
    found = (_adapt_head if isinstance(model, Learner) else _adapt_layers)(model, batch, rates)
    starts = torch.tensor([0, *(len(task.query) for task in batch.tasks)]).cumsum(0).tolist()
    rows = [row + start for (_, _, row), start in zip(found, starts, strict=False)]
    return torch.cat([logits for logits, _, _ in found]), torch.cat([t for _, t, _ in found]), torch.cat(rows)


def _adapt_head(model: Learner, batch: Tasks, rates: Rates) -> list[tuple[Tensor, Tensor, Tensor]]:
    with torch.no_grad():
        supports, support_row = states(model.lm, [s for task in batch.tasks for s in task.support])
    queries, query_row = states(model.lm, [s for task in batch.tasks for s in task.query])
    found, support_at, query_at = [], 0, 0
    for task in batch.tasks:
        in_support = (support_row >= support_at) & (support_row < support_at + len(task.support))
        in_query = (query_row >= query_at) & (query_row < query_at + len(task.query))
        query = queries.select(in_query)
        head = heads.adapt(model.head, supports.select(in_support), rates)
        found.append((heads.logits(head, query), query.targets, query_row[in_query] - query_at))
        support_at, query_at = support_at + len(task.support), query_at + len(task.query)
    return found


def _adapt_layers(model: Any, batch: Tasks, rates: Rates) -> list[tuple[Tensor, Tensor, Tensor]]:
    found = []
    for task in batch.tasks:
        query, row = states(model, task.query, adapt_weights(model, weights_of(model), task.support, rates))
        found.append((query.base, query.targets, row))
    return found


def outer_loss(model: Any, batch: Tasks, rates: Rates) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token of the query sets, after the inner loop."""
    logits, targets, _ = adapted(model, batch, rates)
    loss = cross_entropy(logits, targets)
    return loss, {"loss": float(loss.detach())}


def plain_loss(model: Learner, batch: Tasks) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token of all examples, without an inner loop."""
    found, _ = states(model.lm, [s for task in batch.tasks for s in (*task.support, *task.query)])
    loss = cross_entropy(heads.logits(model.head, found), found.targets)
    return loss, {"loss": float(loss.detach())}


def judge(apply: Apply, tasks: Sequence[Task], rates: Rates) -> dict[str, float]:
    """`loss` (nats per answer token of the query sets after adaptation) and `exact` (share of exact answers)."""
    nats = right = 0.0
    for at in range(0, len(tasks), _EPISODES_PER_PASS):
        batch = choose(tasks, range(at, min(at + _EPISODES_PER_PASS, len(tasks))))
        logits, targets, row = apply(partial(adapted, rates=rates), batch)
        nats += float(cross_entropy(logits, targets, reduction="sum"))
        right += float(exact(logits, targets, row, sum(len(task.query) for task in batch.tasks)).sum())
    questions = sum(len(task.query) for task in tasks)
    return {"loss": nats / sum(task.weight for task in tasks), "exact": right / questions}


def tasks_of(episodes: Sequence[Episode], tokenizer: HFTokenizer, context: int, config: Config) -> list[Task]:
    """Episodes as tokens, with the number of examples limited by `config`; `DataError` if an example is too long."""
    return [
        Task(
            episode.id,
            tuple(example_row(e, tokenizer, context) for e in episode.support[: config.support]),
            tuple(example_row(e, tokenizer, context) for e in episode.query[: config.query]),
        )
        for episode in episodes
    ]


@torch.no_grad()
def logit_changes(model: Learner, task: Task, config: Config) -> dict[str, float]:
    """The largest change of a logit of a query set by one adaptation, by name of the rates."""
    support, query = (states(model.lm, rows)[0] for rows in (task.support, task.query))
    compared = {**COMPARED_RATES, "inner": config.inner}
    return {name: heads.logit_change(model.head, support, query, rates) for name, rates in compared.items()}


def estimate(config: Config, given: Given) -> Estimate:
    """The adapter, and the cost of its training without the inner loop."""
    head = 0 if config.method == "fomaml" else config.head_rank
    adapter, model = AdapterFacts(config.lora.by_target, head), given.find("model", ModelFacts)
    if model is None:
        return Estimate((adapter,))
    return replace(training_estimate(given, model, config.loop, config.lora, merged=False), facts=(adapter,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`episodes` and `model` (the base) -> a PEFT folder, with `head.safetensors` except for method `fomaml`."""
    torch.set_num_threads(context.threads)
    base = inputs["model"].path
    tokenizer, lm = HFTokenizer.load(base), load(base)
    room = lm.config.max_position_embeddings
    training, selection = (
        tasks_of(read_episodes(inputs["episodes"].path, name), tokenizer, room, config)
        for name in ("train", "selection")
    )
    vocabulary, width = lm.lm_head.weight.shape
    start = heads.initial_head(config.head_rank, config.head_alpha, width, vocabulary, context.seed)
    lm = attach(lm, config.lora, context.seed)
    model = lm if config.method == "fomaml" else Learner(lm, start)
    changes = logit_changes(model, selection[0], config) if isinstance(model, Learner) else {}
    at = train(
        model,
        training,
        plain_loss if config.method == "plain" else partial(outer_loss, rates=config.inner),
        config.loop,
        out,
        context,
        lambda apply: judge(apply, selection, config.inner),
        choose,
    )
    save(lm, out)
    base_sha256 = model_fingerprint(inputs["model"])
    if isinstance(model, Learner):
        heads.save(model.head, config.inner, base_sha256, out / heads.FILE)
    return {
        "method": config.method,
        "inner": config.inner.model_dump(),
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "episodes": len(training),
        "steps": at.step,
        "best_step": at.best_step,
        "tokens": at.tokens,
        "largest_logit_change": changes,
        "curve": {"training": at.losses, "selection": at.validations},
        "base_sha256": base_sha256,
    }
