"""Stage `importance`: the importance matrix of a model, by which llama.cpp's quantizers weight errors (SPEC D5).

An error d in a weight of column j changes a layer's output by d x_j. Without correlations, the expected squared error
of an output is the sum over columns of d_j^2 E[x_j^2]. The importance matrix holds E[x_j^2], measured on calibration
rows. A tied embedding is measured as output head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from cogumi.compress.calibration_rows import Draw, draw_rows
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.gguf.weights import IMPORTANCE, Weights
from cogumi.core.errors import ExportError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.models.folders import load, save_tensors
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train.batches import collate
from cogumi.train.validation import passes

VERSION = 1
KIND = "importance"
INPUTS = {"examples": "examples", "model": "model"}

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class Config(BaseModel):
    """`calibration`: the training rows to measure on."""

    model_config = ConfigDict(extra="forbid")
    calibration: Draw = Field(default_factory=Draw)


@torch.no_grad()
def measure(
    model: Any, llama: Llama, rows: Sequence[Row], progress: Any = lambda done, total, figures: None
) -> dict[str, torch.Tensor]:
    """Mean square of every input column of each matrix, f32 `[in]` by GGUF name, over all tokens of the rows."""
    sums: dict[str, torch.Tensor] = {}
    real = torch.zeros(0)

    def accumulate(name: str) -> Any:
        def hook(module: Any, inputs: tuple[torch.Tensor], output: Any) -> None:
            found = inputs[0][real].double().square().sum(0)
            sums[name] = sums[name] + found if name in sums else found

        return hook

    hooks = []
    for tensor in llama.tensors():
        tied = llama.tied and tensor.source == EMBEDDING
        if len(tensor.shape) == 2 and (tied or tensor.source != EMBEDDING):
            module = model.get_submodule((HEAD if tied else tensor.source).removesuffix(".weight"))
            hooks.append(module.register_forward_hook(accumulate(tensor.name)))
    model.eval()
    done = tokens = 0
    for index in passes(rows):
        batch = collate(rows, index).to(next(model.parameters()).device)
        sizes = torch.tensor([rows[i].size for i in index], device=batch.ids.device)
        real = torch.arange(batch.ids.shape[1], device=batch.ids.device) < sizes[:, None]
        model(batch.ids, use_cache=False)
        done, tokens = done + len(index), tokens + int(sizes.sum())
        progress(done, len(rows), {})
    for hook in hooks:
        hook.remove()
    return {name: (total / tokens).float().cpu() for name, total in sums.items()}


def estimate(config: Config, given: Given) -> Estimate:
    """The cost is not estimated."""
    return uncounted()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model` and `examples` -> importance.safetensors."""
    folder = inputs["model"].path
    torch.set_num_threads(context.threads)
    llama, tokenizer = Llama.load(folder), HFTokenizer.load(folder)
    rows = draw_rows(inputs["examples"].path, tokenizer, llama.context, config.calibration, context.seed)
    base = Weights.load(folder).sha256
    found = measure(load(folder), llama, rows, context.progress)
    for name, columns in found.items():
        if not torch.isfinite(columns).all():
            raise ExportError(f"{folder}: the inputs of {name} are NaN or infinite; use an earlier checkpoint")
    save_tensors(found, out / IMPORTANCE, {"base_sha256": base})
    spread = [float(columns.max() / columns.mean()) for columns in found.values()]
    return {
        "rows": len(rows),
        "tokens": sum(row.size for row in rows),
        "matrices": len(found),
        "largest_over_mean": max(spread),
        "base_sha256": base,
    }
