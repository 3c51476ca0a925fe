"""What a bundle will consist of, and how large each of its files will be (SPEC D1).

Models and adapters are counted to the byte (`compress.gguf.file_sizes`). Small nets follow from their layers; what
follows from no shape, such as a calibration, is taken to be as large as the tiny recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    modifier_name,
)
from cogumi.core.errors import ArtifactError
from cogumi.core.registry import stage
from cogumi.core.shapes import ModelShape
from cogumi.pipeline.plan.model_shapes import Model, ranks_of
from cogumi.pipeline.recipe import Recipe, Step

if TYPE_CHECKING:
    from cogumi.compress.gguf.file_sizes import GgufFile

TYPE = "q4_k_m"
"""What a model is asked for as, where no recipe says."""
TAKEN = {
    CALIBRATION: (290_000, 0.73),
    ESCALATION: (2_727_549, 0.75),
    CRITIC: (602_420, 0.11),
    EMBEDDER: (22_835_161, 0.71),
    VOCABULARY: (711_494, 0.28),
    EXAMPLES: (31_000, 0.18),
    CARD: (2_000, 0.48),
    INDEX: (37_000, 0.19),
}
"""Bytes of files that depend on no model's shape, or hardly, and the share that zstd leaves: as in the tiny recipe."""
CLASSES = 6
"""Domains that a router tells apart; one more is 132 bytes."""
_SMALL = {
    "calibration": (CALIBRATION,),
    "escalation": (ESCALATION,),
    "critic": (CRITIC,),
    "embedder": (EMBEDDER, VOCABULARY),
    "examples": (EXAMPLES,),
}
"""Role in stage `bundle` -> the files that come of it."""
_MODIFIER = "modifier_"


@dataclass(frozen=True)
class Weights:
    """A model as it will lie in a bundle; `vocabulary` bytes are those of its tokenizer's keys.

    `type`, `types` and `importance` are what stage `gguf` is told.
    """

    shape: ModelShape
    type: str
    vocabulary: int
    types: tuple[tuple[str, str], ...] = ()
    importance: bool = False

    @cached_property
    def file(self) -> GgufFile:
        """Its file."""
        from cogumi.compress.gguf.file_sizes import model_file

        return model_file(self.shape, self.type, self.vocabulary, dict(self.types), self.importance)

    def with_ids(self, ids: int) -> Weights:
        """The same with a vocabulary of `ids`, at as many bytes an id."""
        keys = self.vocabulary * ids // self.shape.vocabulary
        return replace(self, shape=replace(self.shape, vocabulary=ids), vocabulary=keys)


@dataclass(frozen=True)
class Adapter:
    """A LoRA on the base: its ranks by target, and the type it is written in."""

    ranks: Mapping[str, int]
    type: str = "f32"

    def file(self, shape: ModelShape) -> GgufFile:
        """Its file, on a base of that shape."""
        from cogumi.compress.gguf.file_sizes import adapter_file

        return adapter_file(shape, self.ranks, self.type)

    def reduced(self, rank: int, type: str) -> Adapter:
        """The same at another rank and type, unless that has more bits."""
        from cogumi.compress.gguf.file_sizes import bits

        smaller = Adapter(dict.fromkeys(self.ranks, rank), type)
        before, after = (sum(one.ranks.values()) * bits(one.type) for one in (self, smaller))
        return smaller if after < before else self


@dataclass(frozen=True)
class Parts:
    """What a bundle is made of. `adapters` by file name; `shared`: the draft speaks the base's vocabulary.

    `head` is the rank of a LoRA on the base's output head, or 0; `small` are the other files with their bytes.
    """

    name: str
    base: Weights
    draft: Weights | None = None
    shared: bool = False
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    head: int = 0
    small: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def models(self) -> dict[str, GgufFile]:
        """The GGUF files by name."""
        found = {BASE: self.base.file}
        if self.draft:
            found[DRAFT] = self.draft.file
        return found | {name: adapter.file(self.base.shape) for name, adapter in self.adapters.items()}

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of every file by name."""
        found = {name: file.bytes for name, file in self.models.items()} | dict(self.small)
        if self.head:
            found[HEAD] = 300 + 4 * self.head * (self.base.shape.hidden + self.base.shape.vocabulary)
        return found

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    @cached_property
    def packed(self) -> dict[str, int]:
        """Bytes that zstd would leave of every file: an estimate."""
        from cogumi.compress.gguf.file_sizes import ZSTD

        left = dict.fromkeys(self.files, ZSTD["F32"]) | {name: share for name, (_, share) in TAKEN.items()}
        found = {name: int(left[name] * bytes) for name, bytes in self.files.items()}
        return found | {name: file.packed for name, file in self.models.items()}


def parts_of_model(name: str, model: Model) -> Parts:
    """A model alone, with the types of its matrices where stage `awq` or `gptq` left them beside it."""
    from cogumi.compress.gguf.layout import read_json
    from cogumi.compress.gguf.type_mixture import OVERRIDES

    path, weights = Path(model.folder, OVERRIDES), _weights(model, TYPE)
    if model.folder and path.exists():
        weights = replace(weights, types=tuple(read_json(path).items()))
    return Parts(name, weights)


def parts_of_gguf(path: Path) -> Parts:
    """The model of a GGUF file alone, as it would be planned from its shape and type."""
    from cogumi.compress.gguf.file_sizes import read_model

    shape, type, vocabulary = read_model(path)
    return Parts(path.name, Weights(shape, type, vocabulary))


def known_weights(shape: ModelShape) -> Weights:
    """A model of known shape, with a vocabulary like that of its family."""
    return _weights(Model(shape, ""), TYPE)


def parts_of_recipe(recipe: Recipe, models: Mapping[str, Model]) -> Parts | None:
    """The last bundle that a recipe makes; `models` are those of its steps. None if it makes none of known shapes."""
    steps = {step.name: step for step in recipe.steps}
    bundles = [step for step in recipe.steps if step.stage == "bundle"]
    roles = bundles[-1].inputs if bundles else {}
    base, draft = (_exported(steps, roles.get(role, ""), models) for role in ("base", "draft"))
    if base is None or ("draft" in roles and draft is None):
        return None
    adapters = {
        modifier_name(role.removeprefix(_MODIFIER)): _adapter(steps, name)
        for role, name in roles.items()
        if role.startswith(_MODIFIER)
    }
    if "fewshot" in roles:
        adapters[FEWSHOT] = _adapter(steps, roles["fewshot"])
    head = _config(steps[roles["head"]]).head_rank if "head" in roles else 0
    small = {file: TAKEN[file][0] for role, files in _SMALL.items() if role in roles for file in files}
    small |= {file: TAKEN[file][0] for file in (CARD, INDEX)} | _nets((draft or base).shape.hidden)
    shared = draft is not None and models[roles["base"]].tokenizer == models[roles["draft"]].tokenizer
    return Parts(recipe.name, base, draft, shared, adapters, head, small)


def files_beside(recipe: Recipe, models: Mapping[str, Model]) -> dict[str, GgufFile]:
    """The models that steps of stage `gguf` write and the last bundle does not hold, by step."""
    steps = {step.name: step for step in recipe.steps}
    bundles = [step for step in recipe.steps if step.stage == "bundle"]
    held = set(bundles[-1].inputs.values()) if bundles else set()
    files = {
        name: _exported(steps, name, models)
        for name in steps
        if name not in held and "adapter" not in steps[name].inputs
    }
    return {name: weights.file for name, weights in files.items() if weights}


def _nets(width: int) -> dict[str, int]:
    """Difficulty head and router, on a draft of that width; fp32 behind a safetensors header."""
    layers = ((2 * width, 64), (64, 32), (32, CLASSES))
    router = 4 * (4 * width + 1 + sum(into * out + out for into, out in layers)) + 712
    return {DIFFICULTY: 4 * (width + 1) + 144, ROUTER: router}


def _config(step: Step) -> Any:
    return stage(step.stage).Config.model_validate(step.config)


def _exported(steps: Mapping[str, Step], name: str, models: Mapping[str, Model]) -> Weights | None:
    """The model that a step of stage `gguf` writes."""
    if name not in models or steps[name].stage != "gguf":
        return None
    config = _config(steps[name])
    weights = _weights(models[name], config.type)
    return replace(weights, types=tuple(config.types.items()), importance="importance" in steps[name].inputs)


def _weights(model: Model, type: str) -> Weights:
    from cogumi.compress.gguf.file_sizes import typical_vocabulary, vocabulary_bytes
    from cogumi.compress.gguf.gguf_vocabulary import Vocabulary
    from cogumi.compress.gguf.layout import Llama

    shape, folder = model.shape, Path(model.folder)
    if not model.folder:
        return Weights(shape, type, typical_vocabulary("own" if model.own else shape.kind, shape.vocabulary))
    there = Llama.load(folder)
    if (folder / "tokenizer.json").is_file():
        keys = vocabulary_bytes(Vocabulary.load(folder), there.vocabulary)
    else:
        keys = typical_vocabulary(there.kind, there.vocabulary)
    left = {figure.name: getattr(shape, figure.name) for figure in fields(ModelShape)}
    return replace(Weights(there, type, keys).with_ids(shape.vocabulary), shape=replace(there, **left))


def _adapter(steps: Mapping[str, Step], name: str) -> Adapter:
    """The adapter that a step of stage `gguf` writes, from the step that trained it and those that changed it."""
    exported = _config(steps[name])
    rank, at = None, steps[name].inputs.get("adapter", "")
    while at in steps:
        config = _config(steps[at])
        if hasattr(config, "lora"):
            ranks = ranks_of(config.lora)
            return Adapter(dict.fromkeys(ranks, rank) if rank else ranks, exported.adapter_type)
        rank, at = rank or getattr(config, "rank", None), steps[at].inputs.get("adapter", "")
    raise ArtifactError(f"step '{name}': no step says the ranks of its adapter; train one in this recipe")
