"""LoRA adapters as low-rank factors per layer, read from and written to PEFT folders without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_json
from cogumi.models.folders import save_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_A\.weight")
_UNSUPPORTED = ("use_dora", "use_rslora", "fan_in_fan_out", "modules_to_save", "lora_bias")


@dataclass(frozen=True, slots=True)
class Factors:
    """The update b @ a of one weight matrix: `a` `[rank, in]`, `b` `[out, rank]`, which includes the scale."""

    a: Tensor
    b: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight matrix."""
        return self.b.shape[0], self.a.shape[1]

    def __add__(self, other: Factors) -> Factors:
        """The sum of two updates; ranks add up."""
        return Factors(torch.cat([self.a, other.a]), torch.cat([self.b, other.b], dim=1))


Adapter: TypeAlias = Mapping[str, Factors]
"""An adapter's update of each layer, by the layer's name in the model."""


def read_adapter(folder: Path) -> Adapter:
    """The updates of a PEFT LoRA folder, fp32. `ArtifactError` if it holds none, or another variant of LoRA."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{folder} holds no adapter that can be read ({error}); give a PEFT folder") from error
    if other := next((name for name in _UNSUPPORTED if config.get(name)), None):
        raise ArtifactError(f"{folder}/{CONFIG} sets {other}; only plain LoRA is supported")
    found = {}
    for name, a in sorted(tensors.items()):
        if match := _NAME.fullmatch(name):
            b = tensors[name.replace("lora_A", "lora_B")].float()
            found[match["layer"]] = Factors(a.float(), b * (_alpha(config, match["layer"]) / a.shape[0]))
    if not found:
        raise ArtifactError(f"{folder} adapts no linear layer; give a PEFT folder of kind LORA")
    return found


def _alpha(config: Mapping[str, Any], layer: str) -> float:
    patterns = config.get("alpha_pattern") or {}
    return float(patterns.get(layer.rsplit(".", 1)[-1], config["lora_alpha"]))


def write_adapter(adapter: Adapter, like: Path, out: Path) -> None:
    """Write updates of equal rank as a PEFT folder; all other settings are copied from the folder `like`."""
    config = json.loads((like / CONFIG).read_text(encoding="utf-8"))
    rank = len(next(iter(adapter.values())).a)
    targets = sorted({layer.rsplit(".", 1)[-1] for layer in adapter})
    config |= {"r": rank, "lora_alpha": rank, "rank_pattern": {}, "alpha_pattern": {}, "target_modules": targets}
    tensors = {}
    for layer, factors in adapter.items():
        tensors[f"base_model.model.{layer}.lora_A.weight"] = factors.a.contiguous()
        tensors[f"base_model.model.{layer}.lora_B.weight"] = factors.b.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / CONFIG, config)
    save_tensors(tensors, out / WEIGHTS, {"format": "pt"})


def same_layers(adapters: Mapping[str, Adapter]) -> None:
    """Raise `ArtifactError` unless all adapters have the same layers and shapes."""
    (first, reference), *others = adapters.items()
    for name, adapter in others:
        for layer in sorted({*reference, *adapter}):
            if layer not in adapter or layer not in reference:
                lacking = name if layer not in adapter else first
                raise ArtifactError(f"adapter '{lacking}' does not adapt {layer}; give adapters of the same layers")
            if adapter[layer].shape != reference[layer].shape:
                raise ArtifactError(
                    f"adapter '{name}' is made for {layer} of shape {list(adapter[layer].shape)}, "
                    f"'{first}' for {list(reference[layer].shape)}; give adapters of one base"
                )


def padded(factors: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Updates of several adapters on one layer as `[n, rank, in]` and `[n, out, rank]`, padded with zeros."""
    rank = max(len(f.a) for f in factors)
    a = torch.stack([torch.nn.functional.pad(f.a, (0, 0, 0, rank - len(f.a))) for f in factors])
    b = torch.stack([torch.nn.functional.pad(f.b, (0, rank - f.b.shape[1])) for f in factors])
    return a, b
