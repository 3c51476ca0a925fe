"""LoRA adapters with peft: attach to a frozen base, save as a PEFT folder (Hu et al., 2106.09685)."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import ArtifactError, TrainingError
from cogumi.core.files import write_json
from cogumi.core.registry import nearest
from cogumi.models.folders import load


class LoraShape(BaseModel):
    """Rank and targets; updates are scaled by `alpha / rank`. `ranks` overrides the rank of single targets.

    Avoid multiples of 4: for them llama.cpp uses fp32 kernels whose sums depend on the rest of the batch, so that
    speculation with the adapter is not bit-exact.
    """

    model_config = ConfigDict(extra="forbid")
    rank: int = Field(30, ge=1)
    alpha: float = Field(30.0, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    ranks: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    dropout: float = Field(0.0, ge=0, lt=1)

    @property
    def by_target(self) -> dict[str, int]:
        """The rank of each target."""
        return {target: self.ranks.get(target, self.rank) for target in (*self.targets, *self.ranks)}


def unknown_targets(lora: LoraShape, linear: Collection[str]) -> list[str]:
    """A line for each target that is none of the `linear` maps in a model's layers. The embedding and the output head
    are no targets: where they are tied, one adapter would change both, and llama.cpp applies it to neither.
    """
    return [
        f"LoRA target '{target}' is not a layer of this model; {nearest(target, linear)}"
        for target in lora.by_target
        if target not in linear
    ]


def check_targets(model: Any, shape: LoraShape) -> None:
    """`TrainingError` with the first of `unknown_targets`; for stages that measure the model before they train it."""
    head = model.get_output_embeddings()
    linear = {
        n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head
    }
    if lines := unknown_targets(shape, linear):
        raise TrainingError(lines[0])


def attach(model: Any, shape: LoraShape, seed: int, layers: range | None = None) -> Any:
    """A peft model in which only the adapter is trainable; with `layers` it is on these layers of the model only.

    Raises `TrainingError` as `unknown_targets` says.
    """
    from peft import LoraConfig, get_peft_model

    check_targets(model, shape)
    scale = shape.alpha / shape.rank
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        rank_pattern=shape.ranks,
        alpha_pattern={target: scale * rank for target, rank in shape.ranks.items()},
        target_modules=list(shape.targets),
        task_type="CAUSAL_LM",
        lora_dropout=shape.dropout,
        layers_to_transform=None if layers is None else list(layers),
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft uses a name that transformers has deprecated
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def merged(model: Any, original: Path | None = None) -> Any:
    """The model with its adapter merged; if its weights are quantized, into those of the folder `original`."""
    if original is None:
        return model.merge_and_unload()
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

    whole = PeftModel(load(original), model.peft_config["default"])
    set_peft_model_state_dict(whole, {k: v.cpu() for k, v in get_peft_model_state_dict(model).items()})
    return whole.merge_and_unload()


def with_adapter(model: Any, folder: Path) -> Any:
    """The model with the adapter of a PEFT folder attached. `ArtifactError` if it cannot be read or does not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ArtifactError(f"{folder} holds no adapter that fits this model: {str(error).splitlines()[0]}") from error


def save(model: Any, out: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors, each atomically, the weights last."""
    partial = out / "partial"
    model.save_pretrained(partial, safe_serialization=True)
    config = json.loads((partial / "adapter_config.json").read_text("utf-8"))
    config["target_modules"] = sorted(config["target_modules"])  # peft writes a set, whose order varies
    write_json(partial / "adapter_config.json", config)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.replace(partial / name, out / name)
    for unused in partial.iterdir():
        unused.unlink()
    partial.rmdir()
