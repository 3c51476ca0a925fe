"""What is known of the models of a recipe before there are any."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cogumi.core.errors import ArtifactError
from cogumi.core.files import sha256
from cogumi.core.shapes import ModelShape, find_shape, known
from cogumi.pipeline.recipe import Step


@dataclass(frozen=True, slots=True)
class Model:
    """What is known of a model that a step makes: `tokenizer` names its vocabulary, equal for equal ids; `own` is one
    that the recipe trains itself; `bytewise` one over bytes. `folder` is where it lies, if it is there already.
    """

    shape: ModelShape
    tokenizer: str
    own: bool = False
    bytewise: bool = True
    folder: str = ""


def given(name: str, root: Path) -> Model:
    """The model of a folder or a Hub id; `ArtifactError` if it is neither there nor known."""
    shape, path = find_shape(name, root), root / name / "tokenizer.json"
    if not (root / name).is_dir():
        return Model(shape, str(known(name)).split("-")[0])
    if not path.is_file():
        raise ArtifactError(f"{path.parent} has no tokenizer.json; give a full model folder")
    document = json.loads(path.read_text("utf-8"))
    around = json.dumps([document.get("pre_tokenizer"), document.get("decoder")])
    return Model(shape, f"{name} ({sha256(path)[:8]})", bytewise="ByteLevel" in around, folder=str(root / name))


def cut(step: Step, config: Any, shape: ModelShape) -> ModelShape:
    """What is left of a shape by the stages that cut models; how many ids `trim` leaves is known if it is told."""
    if step.stage == "trim" and config.size:
        return replace(shape, vocabulary=min(config.size, shape.vocabulary))
    if step.stage == "shrink":
        from cogumi.compress.shrink.cutting import smaller

        return smaller(shape, config.asked)
    return shape


def ranks_of(lora: Any) -> dict[str, int]:
    """The rank of each target of a `models.lora.LoraShape`."""
    return {target: lora.ranks.get(target, lora.rank) for target in (*lora.targets, *lora.ranks)}
