"""A tokenizer on plain text: token counts, tokens per word (fertility), lines decoded without loss (SPEC A11)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tokenizers import Tokenizer

from cogumi.bundle.packed import Progress, no_progress
from cogumi.core.errors import DataError
from cogumi.models.tokenization import HFTokenizer

SUFFIXES = (".txt", ".md", ".py")
"""Suffixes of the text files read from a folder; a file given directly may have any name."""
PIECE = 1 << 14
"""Characters after which a long text is split before encoding."""
BATCH = 64
"""Texts encoded at once."""


@dataclass(frozen=True, slots=True)
class Fertility:
    """Tokens per white-space separated word before and after trimming, and the shares of lines decoded without loss."""

    before: float
    after: float
    ascii: float
    unicode: float
    ascii_lines: int
    unicode_lines: int

    @property
    def rise(self) -> float:
        """Relative increase of tokens for the same text."""
        return self.after / self.before - 1

    def figures(self) -> dict[str, dict[str, float]]:
        """The figures as in the stage's metrics."""
        return {
            "tokens_per_word": {"before": self.before, "after": self.after, "rise": self.rise},
            "round_trip": {"ascii": self.ascii, "unicode": self.unicode},
            "lines": {"ascii": self.ascii_lines, "unicode": self.unicode_lines},
        }


def read_texts(paths: Iterable[Path], progress: Progress = no_progress) -> Iterator[str]:
    """Texts of files, and of the `SUFFIXES` files of folders, in pieces that end with a line.

    `DataError` for a missing file, a file that is not UTF-8 text, and a folder without texts.
    """
    sizes = {file: file.stat().st_size for path in paths for file in _files(path)}
    done = 0
    for file, size in sizes.items():
        try:
            text = file.read_bytes().decode("utf-8")
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}); check it, or leave it out") from error
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text ({error.reason}); convert it, or leave it out") from error
        read = 0
        for piece in _pieces(text):
            yield piece
            read += len(piece)
            progress(done + size * read // len(text), sum(sizes.values()))
        done += size


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"there is no corpus file {path}; check the path")
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no texts ({', '.join(SUFFIXES)}); name a folder or files that do")
    return files


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        yield text[start:end]
        start = end


def _encoded(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each text."""
    texts = iter(texts)
    while batch := list(islice(texts, BATCH)):
        yield from (encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False))


def count(tokenizer: HFTokenizer, texts: Iterable[str]) -> Counter[int]:
    """Number of occurrences of each id; text that looks like a control token is encoded as text."""
    found: Counter[int] = Counter()
    for ids in _encoded(tokenizer.plain, texts):
        found.update(ids)
    return found


def tokens_per_word(tokenizer: HFTokenizer, texts: Sequence[str]) -> float:
    """Tokens per word of texts; `DataError` if they hold no words."""
    words = sum(len(text.split()) for text in texts)
    if not words:
        raise DataError("the texts on which to measure tokens per word hold no words; give others")
    return sum(len(ids) for ids in _encoded(tokenizer.plain, texts)) / words


def measure(before: float, tokenizer: HFTokenizer, texts: Sequence[str]) -> Fertility:
    """Figures of a trimmed tokenizer on texts that took `before` tokens per word; `DataError` if they hold no words.

    A line counts as decoded without loss if the result equals the line after the tokenizer's normalizer (NFC).
    """
    lines = sorted({line for text in texts for line in text.split("\n") if line})
    plain = [line for line in lines if line.isascii()]
    other = [line for line in lines if not line.isascii()]
    return Fertility(
        before=before,
        after=tokens_per_word(tokenizer, texts),
        ascii=_round_trip(tokenizer.plain, plain),
        unicode=_round_trip(tokenizer.plain, other),
        ascii_lines=len(plain),
        unicode_lines=len(other),
    )


def _round_trip(tokenizer: Tokenizer, lines: Sequence[str]) -> float:
    """The share of lines decoded without loss; 1 if there are no lines."""
    normal = tokenizer.normalizer.normalize_str if tokenizer.normalizer else str
    decoded = (tokenizer.decode(ids, skip_special_tokens=False) for ids in _encoded(tokenizer, lines))
    equal = sum(normal(line) == text for line, text in zip(lines, decoded, strict=True))
    return equal / len(lines) if lines else 1.0
