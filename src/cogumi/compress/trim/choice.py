"""Choice of the tokens to keep, by their frequency in a corpus, and the effect on texts (SPEC A11)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cogumi.bundle.packed import Progress, no_progress
from cogumi.compress.trim.essential import covering, essential, of_size
from cogumi.compress.trim.fertility import count, measure, tokens_per_word
from cogumi.compress.trim.trimmed_vocabulary import Vocabulary
from cogumi.core.errors import DataError
from cogumi.core.types import Example

COVERS = (0.995, 0.999, 0.9999)
"""Shares of a corpus's tokens that are tried by default."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Frequency of each id in a corpus, and the tokens that are always kept."""

    vocabulary: Vocabulary
    counts: Mapping[int, int]
    always: frozenset[str]

    @classmethod
    def by(
        cls, vocabulary: Vocabulary, examples: Iterable[Example], texts: Iterable[str], named: Iterable[int] = ()
    ) -> Choice:
        """Count the tokens of conversations (with chat template) and plain texts; `DataError` if all are empty.

        `named` are ids to keep besides the essential ones.
        """
        tokenizer = vocabulary.tokenizer
        counts: Counter[int] = count(tokenizer, texts)
        for example in examples:
            counts.update(tokenizer.chat(example.messages))
            counts.update(tokenizer.answer(example.answer))
        if not counts:
            raise DataError("the corpus to trim by is empty; give examples with a training split, or texts")
        return cls(vocabulary, counts, frozenset(essential(tokenizer, vocabulary.bpe, named)))

    def of(self, asked: float) -> set[int]:
        """Ids to keep for a requested number of tokens (an int) or a share of the corpus (a float)."""
        bpe = self.vocabulary.bpe
        if isinstance(asked, int):
            tokens = of_size(bpe, self.counts, asked, self.always)
        else:
            tokens = covering(bpe, self.counts, asked, self.always)
        return {bpe.ids[token] for token in tokens}

    def coverage(self, kept: set[int]) -> float:
        """The share of the corpus's tokens whose ids are kept."""
        return sum(n for i, n in self.counts.items() if i in kept) / sum(self.counts.values())


def survey(
    choice: Choice, texts: Sequence[str], asked: Sequence[float], progress: Progress = no_progress
) -> list[dict[str, Any]]:
    """Effect on texts of trimming to each of these sizes (ints) or covers (floats); no model is needed."""
    rows = []
    vocabulary = choice.vocabulary
    before = tokens_per_word(vocabulary.tokenizer, texts)
    size = sum(map(len, texts))
    for i, one in enumerate(asked, 1):
        progress(i * size, (len(asked) + 1) * size)
        kept = choice.of(one)
        with TemporaryDirectory() as folder:
            found = measure(before, vocabulary.write(kept, Path(folder)), texts)
        rows.append({"asked": one, "tokens": len(kept), "coverage": choice.coverage(kept), **found.figures()})
    return rows
