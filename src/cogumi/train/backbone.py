"""Stage `backbone`: one shared adapter and a small head per domain instead of a whole adapter per domain (SPEC C10).

The shared part and the heads are found by `train.shared_update` from the adapters' weights alone, then trained together
for a while, each row passing through the shared update and its own head. Shared and head in one file are an ordinary
adapter: `adapter_<name>/` holds that for today's runtime, `shared/` and `head_<name>/` what has to be kept. `shared: 0`
makes the control: heads that share nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from cogumi.core.errors import ArtifactError, TrainingError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.facts import AdapterFacts, ModelFacts
from cogumi.core.files import sha256
from cogumi.core.registry import nearest
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.examples import read_examples, split_path
from cogumi.data.responses import read_responses
from cogumi.models.folders import load
from cogumi.models.lora_factors import WEIGHTS, Adapter, Factors, read_adapter, same_layers, write_adapter
from cogumi.models.shared_backbone import Backbone
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.backbone_report import report
from cogumi.train.batches import Batch, collate, make_rows
from cogumi.train.loop import Apply, LoopConfig, Loss, train
from cogumi.train.losses import answer_loss
from cogumi.train.shared_update import Doubles, Span, clusters, cosines, explained, gram, spans, split
from cogumi.train.validation import applied, judge_answers, passes

VERSION = 1
KIND = "backbone"
INPUTS = {"examples": "examples", "responses": "responses", "model": "model", "adapter_*": "adapter"}
TRAINS = True
MANY = 15
"""Domains above which a shared backbone is worth its trouble."""
_ROLE = "adapter_"


class Config(BaseModel):
    """Ranks of the `shared` update and of each `head`; their sum should be no multiple of 4 (see `LoraShape`).

    `questions` of the selection split tell how alike the adapters act; adapters whose mean cosine (of updates and of
    what they do to hidden states) is at least `alike` form a cluster.
    """

    model_config = ConfigDict(extra="forbid")
    shared: int = Field(22, ge=0)
    head: int = Field(8, ge=1)
    questions: int = Field(300, ge=1)
    alike: float = Field(0.5, gt=0, le=1)
    loop: LoopConfig = LoopConfig(steps=240, lr=1e-3, evaluate_every=60)


@dataclass(frozen=True, slots=True)
class Member:
    """An adapter that takes part: its folder, what it changes, and the rows it learns from and is judged by."""

    name: str
    domain: str
    folder: Path
    adapter: Adapter
    learning: list[Row]
    judging: list[Row]


def backbone_loss(heads: Tensor) -> Loss:
    """`answer_loss`, each row of the data set under its head: `heads` `[rows of the data set]`."""

    def loss(model: Backbone, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return answer_loss(model.under(heads[batch.index.cpu()]), batch)

    return loss


def members(inputs: Mapping[str, Artifact], tokenizer: HFTokenizer, room: int, seed: int) -> list[Member]:
    """Every `adapter_<name>` with its domain's rows, those that stage `modifier` took for it.

    Raises `TrainingError` for fewer than two adapters or a domain without questions, `ArtifactError` for adapters that
    do not belong together.
    """
    given = {role.removeprefix(_ROLE): a for role, a in sorted(inputs.items()) if role.startswith(_ROLE)}
    if len(given) < 2:
        raise TrainingError(f"a backbone needs two adapters or more, {len(given)} given; name them adapter_<domain>")
    base = sha256(inputs["model"].path / "model.safetensors")
    for name, artifact in given.items():
        if artifact.metrics.get("base_sha256", base) != base:
            raise ArtifactError(f"adapter '{name}' was trained on another base; train it again on this one")
    adapters = {name: read_adapter(artifact.path) for name, artifact in given.items()}
    same_layers(adapters)
    data = inputs["examples"].path
    asked, selection = (read_examples(split_path(data, name)) for name in ("train", "selection"))
    responses = read_responses(inputs["responses"].path)
    asked = [e for e in asked if e.id in responses]
    found = []
    for name, artifact in given.items():
        domain = artifact.metrics.get("domain", name)
        own, judging = ([e for e in part if e.domain == domain] for part in (asked, selection))
        if not own or not judging:
            known = {e.domain for e in asked} & {e.domain for e in selection}
            raise TrainingError(f"no questions of domain '{domain}' of adapter '{name}'; {nearest(domain, known)}")
        failed = [e for e in own if not responses[e.id].correct]
        if not failed:
            raise TrainingError(f"the base failed no training question of '{domain}': adapter '{name}' has no data")
        if artifact.metrics.get("trained_on") == "random":
            failed = random.Random(seed).sample(own, len(failed))
        learning = make_rows(failed, tokenizer, room)
        found.append(Member(name, domain, artifact.path, adapters[name], learning, make_rows(judging, tokenizer, room)))
    return found


def under(index: int, apply: Apply) -> Apply:
    """`apply` for a `Backbone`, all rows under one head."""

    def alone(function: Callable[[Any, Any], Any], batch: Any) -> Any:
        return apply(lambda model, b: function(model.under(torch.full((len(b.ids),), index)), b), batch)

    return alone


def effects(backbone: Backbone, rows: Sequence[Row], count: int) -> Doubles:
    """Inner products `[adapters, adapters]` of what each does to the last hidden state of each question."""

    def last(model: Any, batch: Batch) -> Tensor:
        hidden: Tensor = model.model(input_ids=batch.ids).last_hidden_state
        return hidden[torch.arange(len(batch.ids)), batch.starts - 1].double().cpu()

    def states(apply: Apply) -> Tensor:
        return torch.cat([apply(last, collate(rows, index)) for index in passes(rows)])

    adapted = [states(under(i, applied(backbone))) for i in range(count)]
    backbone.release()
    plain = states(applied(backbone.model))
    changes = torch.stack([(state - plain).flatten() for state in adapted])
    product: Doubles = (changes @ changes.T).numpy()
    return product


def judged(backbone: Backbone, found: Sequence[Member]) -> dict[str, dict[str, float]]:
    """Selection figures of each adapter on its own domain's rows."""
    return {m.name: judge_answers(under(i, applied(backbone)), m.judging) for i, m in enumerate(found)}


def parts(found: Mapping[str, Span], config: Config, count: int) -> tuple[Adapter, Sequence[Adapter], float, float]:
    """Shared update and heads, and the shares of all updates' squared length in the shared one and in both."""
    shared: dict[str, Factors] = {}
    heads: list[dict[str, Factors]] = [{} for _ in range(count)]
    whole = left = left_by_shared = 0.0
    for layer, span in found.items():
        common, own = split(span.cores, config.shared, config.head)
        whole += float(span.cores.square().sum())
        left_by_shared += float((span.cores - common).square().sum())
        left += float((span.cores - common - own).square().sum())
        if config.shared:
            shared[layer] = span.factors(common, config.shared)
        for head, core in zip(heads, own, strict=True):
            head[layer] = span.factors(core, config.head)
    return shared, heads, 1 - left_by_shared / whole, 1 - left / whole


def write(backbone: Backbone, found: Sequence[Member], out: Path) -> dict[str, int]:
    """The PEFT folders; returns bytes of weights before and after, the shared ones counted once."""
    shared = backbone.shared()
    like = found[0].folder
    if shared:
        write_adapter(shared, like, out / "shared")
    for i, member in enumerate(found):
        head = backbone.head(i)
        write_adapter(head, like, out / f"head_{member.name}")
        whole = {name: shared[name] + factors for name, factors in head.items()} if shared else head
        write_adapter(whole, like, out / f"adapter_{member.name}")
    kept = [out / "shared"] * bool(shared) + [out / f"head_{m.name}" for m in found]
    before, after = (sum((f / WEIGHTS).stat().st_size for f in part) for part in ([m.folder for m in found], kept))
    return {"before": before, "after": after}


def likeness(given: Backbone, by_layer: Mapping[str, Span], found: Sequence[Member], config: Config) -> dict[str, Any]:
    """How alike the adapters are, in their weights and in what they do; takes them off the model."""
    updates = gram(by_layer)
    if not updates.trace():
        raise ArtifactError("the adapters change no weight: nothing can be shared; train them first")
    questions = list({row.id: row for member in found for row in member.judging}.values())
    random.Random(0).shuffle(questions)
    acts = cosines(effects(given, questions[: config.questions], len(found)))
    groups = clusters((cosines(updates) + acts) / 2, config.alike)
    return {
        "explained": explained(updates),
        "cosines": {"updates": cosines(updates).tolist(), "activations": acts.tolist()},
        "clusters": {member.name: group for member, group in zip(found, groups, strict=True)},
    }


def estimate(config: Config, given: Given) -> Estimate:
    """Adapters of the shared rank and a head's, on what the given ones adapt; and the steps of training."""
    adapted = [adapter for role in given.inputs if (adapter := given.find(role, AdapterFacts))]
    rank = config.shared + config.head
    adapter = AdapterFacts({target: rank for one in adapted for target in one.ranks}) if adapted else None
    return uncounted(adapter, model=given.find("model", ModelFacts), steps=config.loop.steps)


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`adapter_<name>` (two or more), `model`, `examples`, `responses` -> shared/, head_<name>/, adapter_<name>/."""
    torch.set_num_threads(context.threads)
    folder = inputs["model"].path
    model = load(folder)
    found = members(inputs, HFTokenizer.load(folder), model.config.max_position_embeddings, context.seed)
    base = {m.name: judge_answers(applied(model), m.judging) for m in found}
    by_layer = spans({m.name: m.adapter for m in found})
    given = Backbone(model, {}, [m.adapter for m in found])
    before = judged(given, found)
    alike = likeness(given, by_layer, found, config)
    shared, heads, by_shared, by_both = parts(by_layer, config, len(found))
    backbone = Backbone(model, shared, heads)
    untrained = judged(backbone, found)
    rows = [row for m in found for row in m.learning]
    which = torch.cat([torch.full((len(m.learning),), i) for i, m in enumerate(found)])

    def validate(apply: Apply) -> dict[str, float]:
        nats = {m.name: judge_answers(under(i, apply), m.judging)["loss"] for i, m in enumerate(found)}
        return {"loss": sum(nats.values()) / len(nats), **nats}

    at = train(backbone, rows, backbone_loss(which), config.loop, out, context, validate)
    after = judged(backbone, found)
    metrics = {
        "domains": {
            m.name: {
                "domain": m.domain,
                "rows": len(m.learning),
                "base": base[m.name],
                "before": before[m.name],
                "untrained": untrained[m.name],
                "after": after[m.name],
                "loss_rise": after[m.name]["loss"] / before[m.name]["loss"] - 1,
                "exact_lost": before[m.name]["exact"] - after[m.name]["exact"],
            }
            for m in found
        },
        "bytes": write(backbone, found, out),
        "ranks": {"shared": config.shared, "head": config.head},
        "kept": {"by_shared": by_shared, "by_both": by_both},
        **alike,
        "many_domains": len({m.domain for m in found}) > MANY,
        "steps": at.step,
        "best_step": at.best_step,
        "curve": {"training": at.losses, "selection": at.validations},
    }
    report(metrics, out)
    return metrics
