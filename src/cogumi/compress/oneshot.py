"""llm-compressor run on a model and rows in memory, without progress bars, files or an accelerator (SPEC D2, D4)."""

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


class _ReportProgress(Modifier):  # type: ignore[misc]
    """Reports progress: one step for each finished layer and one for the head."""

    layers: int
    context: Any
    done: int = 0

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:
        return True

    def on_sequential_epoch_end(self, state: Any, event: Any, **kwargs: Any) -> None:
        self.done += 1
        self.context.progress(self.done, self.layers + 1, {})


def equal_batches(rows: Sequence[Row]) -> list[dict[str, torch.Tensor]]:
    """`input_ids` `[rows, positions]` in batches of rows of equal length, shortest first: padding would distort the
    input statistics that a method measures.
    """
    by_size: defaultdict[int, list[tuple[int, ...]]] = defaultdict(list)
    for row in rows:
        by_size[row.size].append(row.ids)
    batches = []
    for size, ids in sorted(by_size.items()):
        count = max(1, TOKENS // size)
        batches += [{"input_ids": torch.tensor(ids[at : at + count])} for at in range(0, len(ids), count)]
    return batches


@contextmanager
def _quiet_and_unpinned() -> Iterator[None]:
    """Disable progress bars and, without an accelerator, pinned memory.

    llm-compressor pins its cache to speed up copies to an accelerator; without one torch refuses to pin.
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
    progress = _ReportProgress(layers=model.config.num_hidden_layers, context=context)
    with _quiet_and_unpinned():
        oneshot(
            model=model,
            processor=object(),  # a tokenizer for texts; the rows are ids already
            dataset=DataLoader(equal_batches(rows), batch_size=None),  # type: ignore[arg-type]
            recipe=[*modifiers, progress],
            pipeline="sequential",
        )
