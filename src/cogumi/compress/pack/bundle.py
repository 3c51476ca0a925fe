"""Stage `bundle`: collect the exported parts of a cascade in one verified folder with a model card.

Inputs by role: `base`, `draft` and any number of `modifier_<domain>` (artifacts of stage `gguf`), `difficulty` and
`router` (safetensors), and `calibration`; optionally `escalation`, `critic`, `embedder`, `head` and `fewshot`, and
`examples` (few-shot examples for hard questions). Without `draft` the base reads the questions itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cogumi.bundle.format import (
    BASE,
    CALIBRATION,
    CARD,
    CRITIC,
    DIFFICULTY,
    DRAFT,
    EMBEDDER,
    ESCALATION,
    EXAMPLES,
    FEWSHOT,
    HEAD,
    INDEX,
    ROUTER,
    VOCABULARY,
    Part,
    modifier_name,
    open_bundle,
    write_bundle,
)
from cogumi.cascade.modes import MODES, Settings
from cogumi.compress.gguf.planned_files import Adapter, Weights
from cogumi.compress.pack.bundle_parts import Parts
from cogumi.core.errors import ExportError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import AdapterFacts, FileFacts, FileSize, ModelFacts
from cogumi.core.files import write_text
from cogumi.core.registry import nearest
from cogumi.core.stage import Context, matches
from cogumi.core.text import system_prompt
from cogumi.core.types import Artifact
from cogumi.data.examples import iterate_examples, split_path

VERSION = 5
KIND = "bundle"
LIGHT = True

MODIFIER = "modifier_"
MODIFIERS = MODIFIER + "*"
INPUTS = {"base": "gguf", "difficulty": "model|reader", "router": "router|reader", "calibration": "calibration"}
OPTIONAL = {
    "draft": "gguf",
    "escalation": "escalation",
    "critic": "critic",
    "embedder": "embedder",
    "head": "adapter",
    "fewshot": "gguf",
    "examples": "examples",
    MODIFIERS: "gguf",
}
SOURCES = {
    "base": ("model.gguf", BASE, "answers first"),
    "difficulty": (DIFFICULTY, DIFFICULTY, "how hard a question looks"),
    "router": (ROUTER, ROUTER, "which domain a question is from"),
    "calibration": (CALIBRATION, CALIBRATION, "from signals to P(correct), with the threshold"),
    "draft": ("model.gguf", DRAFT, "reads the question, and drafts for the base when that pays"),
    "escalation": (ESCALATION, ESCALATION, "notices that a user is not satisfied with an answer"),
    "critic": (CRITIC, CRITIC, "scores an answer and names what is wrong with it"),
    "embedder": (EMBEDDER, EMBEDDER, "embeds sentences, for the semantic cache"),
    "head": (HEAD, HEAD, "the base's output head, adapted to the examples of a request"),
    "fewshot": ("adapter.gguf", FEWSHOT, "answers together with the adapted head"),
    "examples": ("train.jsonl", EXAMPLES, "questions with answers, shown to the base before hard ones"),
}
"""Role -> (file in the input's folder, name in the bundle, description in the model card)."""
READERS, BESIDE = ("difficulty", "router"), ("calibration", "escalation", "critic", "embedder")
"""Roles whose files are copied, and whose sizes their own stages estimate."""
CALIBRATED = ("selection", "fit", "threshold")
"""Splits whose system prompts the calibration covers."""
OWN_FILES = {EXAMPLES: FileSize(31_000, 0.18), CARD: FileSize(2_000, 0.48), INDEX: FileSize(37_000, 0.19)}
"""Sizes of the files that this stage writes itself, from the recipe tiny."""


class Config(BaseModel):
    """`title` of the model card; number of `examples` kept per domain from the input of that name.

    `copy_base`: a base that lies elsewhere (stage `gguf_file`) is copied, so that the bundle stands alone.
    """

    model_config = ConfigDict(extra="forbid")
    title: str = "A Cogumi cascade"
    mode: str = Field(Settings().default, description="the mode of requests that name none")
    examples: int = Field(40, ge=1)
    copy_base: bool = False

    @field_validator("mode")
    @classmethod
    def _known(cls, mode: str) -> str:
        if mode not in MODES:
            raise ValueError(f"unknown mode '{mode}'; {nearest(mode, MODES)}")
        return mode


def _source(role: str) -> tuple[str, str, str]:
    if matches(role, MODIFIERS):
        domain = role.removeprefix(MODIFIER)
        description = f"answers {domain} questions that the base is unsure of"
        return "adapter.gguf", modifier_name(domain), description
    return SOURCES[role]


def _write_examples(source: Path, target: Path, count: int) -> None:
    """Write the first `count` answerable questions of each domain with their answers, as JSON lines."""
    kept: Counter[str] = Counter()
    lines = []
    for example in iterate_examples(source):
        asked = [message for message in example.messages if message.role != "system"]
        if example.answerable and len(asked) == 1 and kept[example.domain] < count:
            kept[example.domain] += 1
            row = {"domain": example.domain, "question": asked[0].content, "answer": example.answer}
            lines.append(json.dumps(row, ensure_ascii=False))
    write_text(target, "\n".join(lines) + "\n")


def _systems(examples: Artifact) -> dict[str, str]:
    """The system prompts of the questions that gates and guarantee rest on: normalised -> as written."""
    rows = (row.messages for split in CALIBRATED for row in iterate_examples(split_path(examples.path, split)))
    return {system_prompt(row): "\n".join(m.content for m in row if m.role == "system") for row in rows}


def _part(role: str, artifact: Artifact) -> dict[str, Any]:
    """The metrics of a GGUF artifact that identify its base and tokenizer (fields of `Part`)."""
    names = Part.model_fields
    if missing := [name for name in names if name not in artifact.metrics]:
        raise ExportError(
            f"input '{role}' has no metric '{missing[0]}'; export it with stage 'gguf', or take stage 'gguf_file'"
        )
    return {name: artifact.metrics[name] for name in names}


def _figures(metrics: Mapping[str, Any]) -> str:
    """The numbers among a step's metrics, as one line of text."""
    numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v:,}" for k, v in numbers.items())


def model_card(title: str, inputs: Mapping[str, Artifact], sizes: Mapping[str, int]) -> str:
    """README.md of a bundle: its parts, their metrics and the fingerprints of their steps."""
    rows = []
    for role, artifact in inputs.items():
        _, name, description = _source(role)
        made_by = f"`{artifact.fingerprint[:12]}`"
        rows.append(f"| `{name}` | {description} | {sizes[name]:,} | {_figures(artifact.metrics)} | {made_by} |")
    about = inputs["base"].metrics.get("about", {}) if "base" in inputs else {}
    named = {"name": "name", "license": "licence", "languages": "languages"}
    known = {word: about[f"general.{key}"] for key, word in named.items() if about.get(f"general.{key}")}
    base = "; ".join(f"{k}: {', '.join(v) if isinstance(v, list) else v}" for k, v in known.items())
    return f"""# {title}
{f"{chr(10)}Base model: {base}.{chr(10)}" if base else ""}
Chat with it: `cogumi chat <this folder>`; serve it: `cogumi serve <this folder>`.

| part | what it does | bytes | figures of the step that made it | its fingerprint |
|---|---|---:|---|---|
{chr(10).join(rows)}

P(correct) holds for questions like those it was calibrated on, and for no others.
"""


def estimate(config: Config, given: Given) -> Estimate:
    """The known parts of the bundle; none if the base, or a requested draft, is unknown."""
    base, draft = given.find("base", Weights), given.find("draft", Weights)
    if base is None or ("draft" in given.inputs and draft is None):
        return Estimate()
    of_base, of_draft = given.find("base", ModelFacts), given.find("draft", ModelFacts)
    shared = of_base is not None and of_draft is not None and of_base.tokenizer == of_draft.tokenizer
    adapters = {role: given.find(role, Adapter) for role in given.inputs if matches(role, MODIFIERS)}
    adapters |= {"fewshot": given.find("fewshot", Adapter)} if "fewshot" in given.inputs else {}
    nets = {role: given.find(role, FileFacts) for role in (*BESIDE, *READERS) if role in given.inputs}
    unknown = [role for role, found in {**adapters, **nets}.items() if found is None]
    own = {name: size for name, size in OWN_FILES.items() if name != EXAMPLES or "examples" in given.inputs}
    before, after = ([found.sizes for role in roles if (found := nets.get(role))] for roles in (BESIDE, READERS))
    small = {name: size for sizes in (*before, own, *after) for name, size in sizes.items()}
    head = given.find("head", AdapterFacts)
    parts = Parts(
        given.step,
        base,
        draft,
        shared,
        {_source(role)[1]: adapter for role, adapter in adapters.items() if adapter},
        head.head if head else 0,
        small,
    )
    notes = [f"planned without the file of input '{role}', whose size is unknown" for role in unknown]
    return Estimate((parts,), notes=tuple(notes))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """Parts by role -> a bundle in `out`, which is opened once as a check."""
    files: dict[str, Path] = {}
    parts: dict[str, dict[str, Any]] = {}
    for role in [*INPUTS, *(role for role in inputs if role not in INPUTS)]:
        source, name, _ = _source(role)
        files[name] = inputs[role].path / source
        if not files[name].is_file():
            raise ExportError(f"input '{role}' ({inputs[role].path}) holds no {source}; check the recipe")
        if name.endswith(".gguf"):
            parts[name] = _part(role, inputs[role])
        if role == "examples":
            _write_examples(files[name], out / name, config.examples)
            files[name] = out / name
        if role == "embedder":
            files[VOCABULARY] = inputs[role].path / VOCABULARY
    sizes = {name: path.stat().st_size for name, path in files.items()}
    card = out / CARD
    write_text(card, model_card(config.title, inputs, sizes))
    systems = _systems(inputs["examples"]) if "examples" in inputs else {}
    description = {
        "title": config.title,
        "mode": config.mode,
        "system": next(iter(systems.values())) if len(systems) == 1 else "",
        "systems": sorted(systems),
        "parts": parts,
        "seed": context.seed,
        "provenance": {role: artifact.fingerprint for role, artifact in inputs.items()},
        "measured": {role: artifact.metrics for role, artifact in inputs.items()},
    }
    write_bundle(out, {**files, CARD: card}, description, files[BASE].is_symlink() and not config.copy_base)
    open_bundle(out)
    sizes[CARD] = card.stat().st_size
    return {"bytes": sizes, "total_bytes": sum(sizes.values())}
