"""Model folders: initialize, load and save models. fp32 safetensors, Llama architecture (SPEC M1)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import save_file

from cogumi.core.errors import ArtifactError, TrainingError
from cogumi.core.shapes import ModelShape
from cogumi.core.weight_files import check_weight_files
from cogumi.models.tokenization import HFTokenizer
from cogumi.models.tokenizer_settings import copy_tokenizer

Quantize: TypeAlias = Literal["nf4"] | None
"""Type of frozen weights while an adapter is trained: unchanged, or 4 bits (Dettmers et al. 2023, QLoRA)."""


class Shape(BaseModel):
    """Sizes of a Llama model; `hidden` must be a multiple of `heads`, and of 32 for quantization."""

    model_config = ConfigDict(extra="forbid")
    hidden: int = Field(128, ge=32, multiple_of=32)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    feed_forward: int = Field(384, ge=32, multiple_of=32)
    context: int = Field(512, ge=16)

    def of_vocabulary(self, ids: int) -> ModelShape:
        """The shape of the model that `build` makes for a vocabulary."""
        head = self.hidden // self.heads
        layers, context = self.layers, self.context
        return ModelShape(self.hidden, self.feed_forward, layers, self.heads, self.heads, head, ids, context, tied=True)


def build(shape: Shape, tokenizer: HFTokenizer, seed: int) -> Any:
    """A randomly initialised `LlamaForCausalLM` with tied embeddings for this tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=tokenizer.size,
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def locate(name: str, root: Path) -> Path:
    """The model folder of a path (relative to `root`) or of a Hub id, which is downloaded if necessary."""
    folder = root / name
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"'{name}' is neither a folder under {root} nor a model of the Hub that can be downloaded"
        ) from error


def load(folder: Path, quantize: Quantize = None) -> Any:
    """The causal language model of a folder, ready for training: in fp32, or with its matrices in 4 bits on a GPU.

    A stored head that differs from the embedding is used, even if the config says that they are tied.
    Raises `TrainingError` for `nf4` without a GPU, `ArtifactError` for a folder without a model or with `.bin` files
    only, and for weights that are not finite.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # the pipeline shows its own
    options: dict[str, Any] = {"dtype": torch.float32}
    if quantize:
        if not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None:
            raise TrainingError(
                f"quantize: {quantize} needs a CUDA GPU and the package bitsandbytes (pip install 'cogumi[gpu]'); "
                "train without 'quantize' here"
            )
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantize,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options = {"dtype": torch.bfloat16, "quantization_config": four_bits, "device_map": {"": _local_rank()}}
    check_weight_files(folder)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"{folder} holds no model that can be loaded: {str(error).splitlines()[0]}") from error
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not bool(weight.isfinite().all()):
            raise ArtifactError(f"{folder}: {name} holds NaN or infinity; use a checkpoint from before training failed")
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # the folder's config may say otherwise; what it stores is the model
    return model


def _local_rank() -> int:
    """Index of the GPU assigned to this process by the launcher."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def save(model: Any, tokenizer_folder: Path, out: Path) -> None:
    """Write config.json, model.safetensors (atomically) and the tokenizer files."""
    model.config.save_pretrained(out)
    tied = model.config.tie_word_embeddings
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    save_tensors(tensors, out / "model.safetensors", {"format": "pt"})
    copy_tokenizer(tokenizer_folder, out)


def save_tensors(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically."""
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata)
    os.replace(partial, path)


def parameters(model: torch.nn.Module) -> int:
    """Number of distinct weights."""
    return sum(p.numel() for p in model.parameters())
