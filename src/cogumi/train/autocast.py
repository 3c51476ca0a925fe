"""Number format of the computation in training: fp32, or bf16 where the hardware multiplies it (SPEC C1).

Weights, gradients of weights and optimizer states keep their type; autocast computes matrix products in bf16.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeAlias

import torch

Precision: TypeAlias = Literal["auto", "fp32", "bf16"]
"""`auto`: bf16 on a processor with AMX or a GPU that computes it, fp32 elsewhere; so weights depend on the machine."""

TILE = 16
"""Rows are padded to multiples of this length in bf16: oneDNN keeps buffers for every shape that it has computed."""


def uses_bf16(precision: Precision, device: str) -> bool:
    """Whether the computation on the device type `cpu` or `cuda` of this machine is in bf16."""
    if precision != "auto":
        return precision == "bf16"
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def computing(precision: Precision, device: str) -> AbstractContextManager[object]:
    """The context in which a model on this device type runs."""
    return torch.autocast(device, torch.bfloat16) if uses_bf16(precision, device) else nullcontext()


def missing(length: int, device: str) -> int:
    """Positions by which `length` is padded: up to whole tiles inside a bf16 context, else none."""
    return -length % TILE if torch.is_autocast_enabled(device) else 0
