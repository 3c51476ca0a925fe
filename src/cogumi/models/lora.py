"""LoRA adapters by peft: put on a frozen base, saved as a PEFT folder (Hu et al., 2106.09685)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.errors import TrainingError


class LoraShape(BaseModel):
    """Rank and targets; updates are scaled by `alpha / rank`.

    The rank is no multiple of 4: for those llama.cpp takes fp32 kernels whose sums depend on what else is in the batch,
    and speculation under an adapter would no longer be bit-exact.
    """

    model_config = ConfigDict(extra="forbid")
    rank: int = Field(30, ge=1)
    alpha: float = Field(30.0, gt=0)
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def attach(model: Any, shape: LoraShape, seed: int) -> Any:
    """A peft model whose only trainable weights are the adapter's. `TrainingError` if a target matches no module."""
    from peft import LoraConfig, get_peft_model

    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    missing = [t for t in shape.targets if t not in names]
    if missing:
        raise TrainingError(f"LoRA targets {missing} match no linear layer; this model has {sorted(names)}")
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        target_modules=list(shape.targets),
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():  # peft still asks transformers by a name that it has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def save(model: Any, out: Path) -> None:
    """adapter_config.json and adapter_model.safetensors, the weights last and at once."""
    partial = out / "partial"
    model.save_pretrained(partial, safe_serialization=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        os.replace(partial / name, out / name)
    for rest in partial.iterdir():
        rest.unlink()
    partial.rmdir()
