"""llm-compressor on our own rows: quietly, with or without an accelerator, leaving no files (SPEC D2, D4)."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from compressed_tensors.utils import patch_attr
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch.utils.data import DataLoader
from tqdm import tqdm

from cogumi.core.stage import Context
from cogumi.models.tokenization import Row
from cogumi.train.validation import TOKENS


class _Layers(Modifier):  # type: ignore[misc]
    """Tells the progress: one step for each part of the model that is done (its layers, and then its head)."""

    layers: int
    context: Any
    done: int = 0

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        self.done += 1
        self.context.progress(self.done, self.layers + 1, {})


def equal_batches(rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
    """`input_ids` `[rows, positions]` of rows of equal length, shortest first: none is padded, because padding would
    count among the inputs that a method measures.
    """
    by_size: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in rows:
        by_size[row.size].append(row.ids)
    batches = []
    for size, ids in sorted(by_size.items()):
        many = max(1, TOKENS // size)
        batches += [{"input_ids": torch.tensor(ids[at : at + many])} for at in range(0, len(ids), many)]
    return batches


@contextmanager
def _quiet_and_unpinned() -> Iterator[None]:
    """No bars; and where there is no accelerator, no pinned memory.

    llm-compressor pins what it caches so that copies to an accelerator are fast. Without one torch refuses to pin,
    and there is nothing to gain.
    """
    make = tqdm.__init__

    def without_bar(bar: Any, *args: Any, **options: Any) -> None:
        make(bar, *args, **{**options, "disable": True})

    with ExitStack() as stack:
        stack.enter_context(patch_attr(tqdm, "__init__", without_bar))
        stack.enter_context(patch_attr(logging.getLogger("torch.fx._symbolic_trace"), "disabled", True))
        if not torch.accelerator.is_available():
            stack.enter_context(patch_attr(IntermediatesCache, "pin_memory", lambda cache, index, names=None: None))
        yield


def calibrated(model: Any, modifiers: Sequence[Modifier], rows: Sequence[Row], context: Context) -> None:
    """Apply llm-compressor's `modifiers` to `model`, in place, layer by layer, with `rows` (at least one) as inputs."""
    layers = _Layers(layers=model.config.num_hidden_layers, context=context)
    with _quiet_and_unpinned():
        oneshot(
            model=model,
            processor=object(),  # reads texts; ours are ids already
            dataset=DataLoader(equal_batches(rows), batch_size=None),  # type: ignore[arg-type]
            recipe=[*modifiers, layers],
            pipeline="sequential",
        )
