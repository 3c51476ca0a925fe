"""Stage `backbone`: one shared adapter and a small head per domain instead of a full adapter per domain (SPEC C10).

`train.shared_update` computes the shared update and the heads from the adapters' weights; then they are trained
together, each row with the shared update and the head of its domain. `shared/` and `head_<name>/` hold the parts,
`adapter_<name>/` their sum, which is an ordinary adapter for the engines. `shared: 0` is the control: heads only.
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
from cogumi.core.model_fingerprint import model_fingerprint
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
"""Number of domains above which a shared backbone pays off."""
_ROLE = "adapter_"


class Config(BaseModel):
    """Ranks of the `shared` update and of each `head`; their sum should not be a multiple of 4 (see `LoraShape`).

    The similarity of the adapters is the mean cosine of their updates and of their effects on hidden states, measured
    on `questions` of the selection split; adapters with at least `alike` form a cluster.
    """

    model_config = ConfigDict(extra="forbid")
    shared: int = Field(22, ge=0)
    head: int = Field(8, ge=1)
    questions: int = Field(300, ge=1)
    alike: float = Field(0.5, gt=0, le=1)
    loop: LoopConfig = LoopConfig(steps=240, lr=1e-3, evaluate_every=60)


@dataclass(frozen=True, slots=True)
class Member:
    """An input adapter: its folder, its updates, and the rows to train and to validate it on."""

    name: str
    domain: str
    folder: Path
    adapter: Adapter
    training: list[Row]
    selection: list[Row]


def backbone_loss(heads: Tensor) -> Loss:
    """`answer_loss` with one head per row: `heads` `[rows of the data set]` are head numbers."""

    def loss(model: Backbone, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        return answer_loss(model.under(heads[batch.index.cpu()]), batch)

    return loss


def members(inputs: Mapping[str, Artifact], tokenizer: HFTokenizer, room: int, seed: int) -> list[Member]:
    """Every `adapter_<name>` with the rows of its domain on which stage `modifier` trained it.

    Raises `TrainingError` for fewer than two adapters or a domain without questions, `ArtifactError` for adapters of
    different bases, layers or shapes.
    """
    given = {role.removeprefix(_ROLE): a for role, a in sorted(inputs.items()) if role.startswith(_ROLE)}
    if len(given) < 2:
        raise TrainingError(f"a backbone needs two adapters or more, {len(given)} given; name them adapter_<domain>")
    base = model_fingerprint(inputs["model"])
    for name, artifact in given.items():
        if artifact.metrics.get("base_sha256", base) != base:
            raise ArtifactError(f"adapter '{name}' was trained on another base; train it again on this one")
    adapters = {name: read_adapter(artifact.path) for name, artifact in given.items()}
    same_layers(adapters)
    data = inputs["examples"].path
    questions, selection = (read_examples(split_path(data, name)) for name in ("train", "selection"))
    responses = read_responses(inputs["responses"].path)
    questions = [e for e in questions if e.id in responses]
    found = []
    for name, artifact in given.items():
        domain = artifact.metrics.get("domain", name)
        own, judging = ([e for e in part if e.domain == domain] for part in (questions, selection))
        if not own or not judging:
            known = {e.domain for e in questions} & {e.domain for e in selection}
            raise TrainingError(f"no questions of domain '{domain}' of adapter '{name}'; {nearest(domain, known)}")
        failed = [e for e in own if not responses[e.id].correct]
        if not failed:
            raise TrainingError(f"the base failed no training question of '{domain}': adapter '{name}' has no data")
        if artifact.metrics.get("trained_on") == "random":
            failed = random.Random(seed).sample(own, len(failed))
        training = make_rows(failed, tokenizer, room)
        found.append(Member(name, domain, artifact.path, adapters[name], training, make_rows(judging, tokenizer, room)))
    return found


def under(index: int, apply: Apply) -> Apply:
    """`apply` for a `Backbone`, with one head for all rows."""

    def alone(function: Callable[[Any, Any], Any], batch: Any) -> Any:
        return apply(lambda model, b: function(model.under(torch.full((len(b.ids),), index)), b), batch)

    return alone


def effects(backbone: Backbone, rows: Sequence[Row], count: int) -> Doubles:
    """Inner products `[adapters, adapters]` of the adapters' changes to the last hidden state of each question."""

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
    """Figures of each adapter on the selection rows of its domain."""
    return {m.name: judge_answers(under(i, applied(backbone)), m.selection) for i, m in enumerate(found)}


def parts(found: Mapping[str, Span], config: Config, count: int) -> tuple[Adapter, Sequence[Adapter], float, float]:
    """Shared update and heads, and the shares of the updates' squared norm explained by the shared one and by both."""
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
    """Write the PEFT folders; returns bytes of weights before and after, with the shared ones counted once."""
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


def similarity(
    given: Backbone, by_layer: Mapping[str, Span], found: Sequence[Member], config: Config
) -> dict[str, Any]:
    """Similarity of the adapters' weights and of their effects; removes the adapters from the model."""
    updates = gram(by_layer)
    if not updates.trace():
        raise ArtifactError("every update of the adapters is zero, so there is nothing to share; train them first")
    questions = list({row.id: row for member in found for row in member.selection}.values())
    random.Random(0).shuffle(questions)
    activations = cosines(effects(given, questions[: config.questions], len(found)))
    groups = clusters((cosines(updates) + activations) / 2, config.alike)
    return {
        "explained": explained(updates),
        "cosines": {"updates": cosines(updates).tolist(), "activations": activations.tolist()},
        "clusters": {member.name: group for member, group in zip(found, groups, strict=True)},
    }


def estimate(config: Config, given: Given) -> Estimate:
    """Adapters with the sum of shared and head rank on the targets of the given ones, and the steps of training."""
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
    base = {m.name: judge_answers(applied(model), m.selection) for m in found}
    by_layer = spans({m.name: m.adapter for m in found})
    given = Backbone(model, {}, [m.adapter for m in found])
    before = judged(given, found)
    similar = similarity(given, by_layer, found, config)
    shared, heads, by_shared, by_both = parts(by_layer, config, len(found))
    backbone = Backbone(model, shared, heads)
    untrained = judged(backbone, found)
    rows = [row for m in found for row in m.training]
    which = torch.cat([torch.full((len(m.training),), i) for i, m in enumerate(found)])

    def validate(apply: Apply) -> dict[str, float]:
        nats = {m.name: judge_answers(under(i, apply), m.selection)["loss"] for i, m in enumerate(found)}
        return {"loss": sum(nats.values()) / len(nats), **nats}

    at = train(backbone, rows, backbone_loss(which), config.loop, out, context, validate)
    after = judged(backbone, found)
    metrics = {
        "domains": {
            m.name: {
                "domain": m.domain,
                "rows": len(m.training),
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
        **similar,
        "many_domains": len({m.domain for m in found}) > MANY,
        "steps": at.step,
        "best_step": at.best_step,
        "curve": {"training": at.losses, "selection": at.validations},
    }
    report(metrics, out)
    return metrics
