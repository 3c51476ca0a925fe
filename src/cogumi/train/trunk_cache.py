"""Hidden states of rows after the frozen lower layers ("trunk") of a model, computed once and kept on disk (SPEC M5).

If only upper layers are trained, the lower ones give the same states in every epoch and validation. A cache is one
memory-mapped file beside the checkpoint, filled batch by batch; an interrupted pass continues after its last batch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from accelerate import PartialState

from cogumi.core.errors import TrainingError
from cogumi.core.files import write_json
from cogumi.core.stage import Context
from cogumi.models.tokenization import Row
from cogumi.models.upper_layers import lower_states
from cogumi.train.autocast import Precision, computing, uses_bf16
from cogumi.train.batches import Batch, collate
from cogumi.train.checkpoint import identity
from cogumi.train.validation import passes

CacheType: TypeAlias = Literal["fp16", "fp32"]
Collate: TypeAlias = Callable[[Sequence[Any], Sequence[int]], Batch]
TYPES: dict[CacheType, type[np.floating[Any]]] = {"fp16": np.float16, "fp32": np.float32}
PHASE = "rows through the frozen layers"
"""Name of the caching pass in the progress display."""


class TrunkCache:
    """The states of `rows` after the first `below` layers, in the files `<path>.states` and `<path>.json`."""

    def __init__(self, path: Path, rows: Sequence[Row], below: int, hidden: int, kind: CacheType) -> None:
        self.rows, self.below, self.kind = rows, below, kind
        self._file, self._progress = path.with_suffix(".states"), path.with_suffix(".json")
        self._first = np.cumsum([0, *(row.size for row in rows)]).tolist()
        self._shape = (self._first[-1], hidden)
        self._states: Any = None

    def fill(self, model: Any, context: Context, index: Sequence[int], precision: Precision = "fp32") -> None:
        """Compute the states of the rows `index` with a frozen model, unless an interrupted run did.

        Under a launch of several processes the first one computes, and the others wait for it. Raises `TrainingError`
        for states too large for the type of the cache.
        """
        with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
            self._fill(model, context, index, precision)

    def _fill(self, model: Any, context: Context, index: Sequence[int], precision: Precision) -> None:
        device = next(model.parameters()).device
        bf16 = uses_bf16(precision, device.type)
        key = self._key(model, index, bf16)
        done = self._done(key)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        states = np.memmap(self._file, TYPES[self.kind], "r+" if done else "w+", shape=self._shape)
        model.eval()
        chosen = [self.rows[i] for i in index]
        rows_done = 0
        for number, batch in enumerate(passes(chosen)):
            rows_done += len(batch)
            if number < done:
                continue
            with computing(precision, device.type):
                ids = collate(chosen, batch).to(device).in_tiles().ids
                found = lower_states(model, ids, self.below).float().cpu().numpy()
            for k, values in zip(batch, found, strict=True):
                self._write(states, index[k], values)
            states.flush()
            write_json(self._progress, {"key": key, "batches": number + 1})
            context.progress(rows_done, len(chosen), {PHASE: rows_done})
        self._states = torch.from_numpy(np.memmap(self._file, TYPES[self.kind], "r+", shape=self._shape))

    def _write(self, states: Any, i: int, values: np.ndarray) -> None:
        most = float(np.abs(values[: self.rows[i].size]).max())
        if not most <= float(np.finfo(TYPES[self.kind]).max):
            raise TrainingError(f"hidden states reach {most:.3g}, too much for a cache of fp16; set `cache: fp32`")
        states[self._first[i] : self._first[i + 1]] = values[: self.rows[i].size]

    def _key(self, model: Any, index: Sequence[int], bf16: bool) -> str:
        """Identifies everything that the states depend on."""
        digest = hashlib.sha256(f"{identity(model)} {self.below} {self.kind} {bf16}".encode())
        for i in index:
            digest.update(f"{i} {self.rows[i].ids}".encode())
        return digest.hexdigest()

    def _done(self, key: str) -> int:
        """Number of batches that an interrupted run has computed for the same states."""
        try:
            found = json.loads(self._progress.read_text("utf-8"))
        except (OSError, ValueError):
            return 0
        return int(found["batches"]) if found.get("key") == key and self._file.exists() else 0

    def collate_from(self, first: int) -> Collate:
        """`batches.collate` of rows that lie in this cache from row `first` on, with their states in fp32."""

        def collated(rows: Sequence[Row], index: Sequence[int]) -> Batch:
            batch = collate(rows, index)
            states = torch.zeros(*batch.ids.shape, self._shape[1])  # padding is ignored by causal attention
            for r, i in enumerate(index):
                states[r, : rows[i].size] = self._states[self._first[first + i] : self._first[first + i + 1]]
            return replace(batch, states=states)

        return collated
