"""The planned parts of a bundle and the sizes of their files (SPEC D1).

Sizes of models and adapters are exact (`compress.gguf.file_sizes`); those of the other files are estimates of the
stages that make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from cogumi.bundle.format import BASE, DRAFT, HEAD
from cogumi.compress.gguf.planned_files import Adapter, Weights
from cogumi.core.facts import FP32_PACKED, FileSize

if TYPE_CHECKING:
    from cogumi.compress.gguf.file_sizes import GgufFile


@dataclass(frozen=True)
class Parts:
    """The parts of a bundle. `adapters` by file name; `shared`: the draft has the base's vocabulary.

    `head` is the rank of a LoRA on the base's output head, or 0; `small` are the other files.
    """

    name: str
    base: Weights
    draft: Weights | None = None
    shared: bool = False
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    head: int = 0
    small: Mapping[str, FileSize] = field(default_factory=dict)

    def named(self, name: str) -> Parts:
        """The same under another name."""
        return replace(self, name=name)

    @cached_property
    def models(self) -> dict[str, GgufFile]:
        """The GGUF files by name."""
        found = {BASE: self.base.file}
        if self.draft:
            found[DRAFT] = self.draft.file
        return found | {name: adapter.file(self.base.shape) for name, adapter in self.adapters.items()}

    @cached_property
    def files(self) -> dict[str, int]:
        """Bytes of every file by name."""
        found = {name: file.bytes for name, file in self.models.items()}
        found |= {name: file.bytes for name, file in self.small.items()}
        if self.head:
            found[HEAD] = 300 + 4 * self.head * (self.base.shape.hidden + self.base.shape.vocabulary)
        return found

    @property
    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    @cached_property
    def packed(self) -> dict[str, int]:
        """Estimated bytes of every file after zstd."""
        shares = {name: file.packed for name, file in self.small.items()}
        found = {name: int(shares.get(name, FP32_PACKED) * bytes) for name, bytes in self.files.items()}
        return found | {name: file.packed for name, file in self.models.items()}
