"""Stage `trim`: remove the tokens that a corpus hardly uses from a model (SPEC A11).

The tokens that cover nearly all of a corpus are kept, with the essential ones (`essential`) and their merge parents
(`bpe`); the rest is removed from all files (`remap`), without training. Words whose token is removed are split into
more tokens than in training; tokens per word and perplexity per byte measure the loss. If it exceeds a limit, more
tokens are kept; if no candidate satisfies the limits, the output is the unchanged model.

An adapter of linear layers fits the trimmed model unchanged, because it has no rows per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, inf
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator

from cogumi.compress.trim.choice import COVERS, Choice
from cogumi.compress.trim.fertility import Fertility, measure, read_texts, tokens_per_word
from cogumi.compress.trim.remap import Model
from cogumi.core.errors import DataError
from cogumi.core.estimate import NOT_COUNTED, Estimate, Given
from cogumi.core.facts import ModelFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import iterate_examples, read_examples, split_path
from cogumi.models.folders import load
from cogumi.models.tokenization import Row
from cogumi.train.batches import make_rows
from cogumi.train.validation import applied, judge_answers

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "model": "model"}
OPTIONAL = {"tokenizer": "model"}

UNKNOWN_IDS = "the kept vocabulary depends on the corpus; what follows is planned as if all ids stayed"
NO_LIMITS = {"ascii": 0.0, "unicode": 0.0, "tokens_per_word": inf, "perplexity": inf}


class Config(BaseModel):
    """`covers` are shares of the corpus's tokens, tried in order until all limits hold; `size` is a number of tokens
    instead. The corpus is the training split and the texts in `corpus`; candidates are measured on the selection split
    and the texts in `measure`: files, or folders of .txt, .md and .py files.

    Limits: the least shares of `ascii` and other (`unicode`) lines decoded without loss, and the largest relative
    increases of `tokens_per_word` and of the `perplexity` per byte of the selection split's answers.
    """

    model_config = ConfigDict(extra="forbid")
    covers: tuple[float, ...] = Field(COVERS, min_length=1)
    size: int | None = Field(None, ge=257)
    corpus: tuple[Path, ...] = ()
    measure: tuple[Path, ...] = ()
    ascii: float = Field(1.0, ge=0, le=1)
    unicode: float = Field(0.999, ge=0, le=1)
    tokens_per_word: float = Field(0.05, ge=0)
    perplexity: float = Field(0.03, ge=0)

    @field_validator("covers")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if list(value) != sorted(set(value)) or not 0 < value[0] <= value[-1] <= 1:
            raise ValueError("covers must be rising shares above 0 and up to 1")
        return value


@dataclass(frozen=True, slots=True)
class Quality:
    """Figures of the selection split's answers: nats per token (`loss`) and per byte, and the exact share."""

    loss: float
    nats_per_byte: float
    exact: float

    @classmethod
    def of(cls, folder: Path, rows: Sequence[Row], size: int) -> Quality:
        """Measure a model on rows whose answers have `size` bytes in total."""
        figures = judge_answers(applied(load(folder)), rows)
        return cls(figures["loss"], figures["loss"] * sum(row.weight for row in rows) / size, figures["exact"])


def compare(before: Model, after: Model, examples: Sequence[Example]) -> tuple[Quality, Quality]:
    """The quality of both models, on the examples that fit both contexts; `DataError` if there are none."""
    rows = [make_rows(examples, model.vocabulary.tokenizer, model.context) for model in (before, after)]
    shared = {row.id for row in rows[0]} & {row.id for row in rows[1]}
    size = sum(len(example.answer.encode()) for example in examples if example.id in shared)
    if not size:
        raise DataError("no answer of the selection split fits the model's context; give shorter examples")
    rows_before, rows_after = ([row for row in some if row.id in shared] for some in rows)
    return Quality.of(before.folder, rows_before, size), Quality.of(after.folder, rows_after, size)


def text_problem(config: Config, found: Fertility) -> str | None:
    """The limit on texts that is exceeded, or None."""
    for kind, share, least in (("ASCII", found.ascii, config.ascii), ("other", found.unicode, config.unicode)):
        if share < least:
            return f"{share:.3%} of {kind} lines are decoded without loss, below {least:.3%}"
    if found.rise > config.tokens_per_word:
        return f"tokens per word rise by {found.rise:.1%}, above {config.tokens_per_word:.1%}"
    return None


def quality_problem(config: Config, before: Quality, after: Quality) -> str | None:
    """The limit on perplexity per byte if it is exceeded or the perplexity is NaN; else None."""
    rise = exp(after.nats_per_byte - before.nats_per_byte) - 1
    if rise <= config.perplexity:
        return None
    return f"perplexity per byte rises by {rise:.1%}, above {config.perplexity:.1%}"


@dataclass(frozen=True, slots=True)
class Sample:
    """Examples and texts to measure on, and the original model's tokens per word on the texts."""

    examples: Sequence[Example]
    texts: Sequence[str]
    tokens_per_word: float


def attempt(config: Config, model: Model, kept: set[int], sample: Sample, out: Path) -> dict[str, Any]:
    """Write the model with these ids to `out` and measure it; `problem` is the limit that is exceeded, or None.

    The answers are measured only if the limits on texts hold.
    """
    found = measure(sample.tokens_per_word, model.vocabulary.write(kept, out), sample.texts)
    problem = text_problem(config, found)
    figures: dict[str, Any] = {"tokens": len(kept), **found.figures()}
    if problem is None:
        model.write(kept, out)
        before, after = compare(model, Model.load(out), sample.examples)
        problem = quality_problem(config, before, after)
        figures |= {"before": asdict(before), "after": asdict(after)}
    return figures | {"problem": problem}


def candidates(
    config: Config, model: Model, inputs: Mapping[str, Artifact], context: Context
) -> Iterator[tuple[dict[str, Any], set[int]]]:
    """Candidates in order: how the ids were chosen, and the ids. `DataError` if `tokenizer` lacks needed ids."""
    if "tokenizer" in inputs:
        folder = inputs["tokenizer"].path
        kept = model.vocabulary.following(folder)
        if not model.named <= kept:
            raise DataError(f"{folder} lacks a token that a config of {model.folder} names; leave out `tokenizer`")
        yield {"asked": "followed"}, kept
        return
    train = iterate_examples(split_path(inputs["examples"].path, "train"))
    texts = read_texts(context.root / path for path in config.corpus)
    choice = Choice.by(model.vocabulary, train, texts, model.named)
    for asked in config.covers if config.size is None else (config.size,):
        kept = choice.of(asked)
        yield {"asked": asked, "always": len(choice.always), "coverage": choice.coverage(kept)}, kept


def estimate(config: Config, given: Given) -> Estimate:
    """A model with `size` ids; with all its ids if the corpus decides."""
    model = given.find("model", ModelFacts)
    if config.size is None:
        return Estimate((model,), notes=(NOT_COUNTED, UNKNOWN_IDS))
    if model:
        ids = min(config.size, model.shape.vocabulary)
        model = replace(model, shape=replace(model.shape, vocabulary=ids))
    return Estimate((model,), notes=(NOT_COUNTED,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model`, `examples`, optionally `tokenizer` -> a model folder.

    `tokenizer` is the trimmed folder of another model with the same tokenizer (a draft's base). This model then gets
    the same vocabulary without limits, because draft and base must share it.
    """
    torch.set_num_threads(context.threads)
    model = Model.load(inputs["model"].path)
    examples = read_examples(split_path(inputs["examples"].path, "selection"))
    texts = [text for e in examples for text in (*(m.content for m in e.messages), e.answer)]
    texts += read_texts(context.root / path for path in config.measure)
    sample = Sample(examples, texts, tokens_per_word(model.vocabulary.tokenizer, texts))
    limits = config.model_copy(update=NO_LIMITS) if "tokenizer" in inputs else config
    attempts: list[dict[str, Any]] = []
    for how, kept in candidates(config, model, inputs, context):
        context.progress(len(attempts), None, {"tokens": len(kept)})
        attempts.append(how | attempt(limits, model, kept, sample, out))
        if attempts[-1]["problem"] is None:
            break
    else:
        model.copy(out)
    written, reason = Model.load(out), attempts[-1]["problem"]
    figures = {"tokens": len(written.vocabulary.bpe.ids), "bytes saved": model.bytes - written.bytes}
    context.progress(len(attempts), len(attempts), figures)
    chosen = attempts[-1] if reason is None else {}
    return {
        "rolled_back": reason is not None,
        "reason": reason,
        "tokens": {"before": len(model.vocabulary.bpe.ids), "after": len(written.vocabulary.bpe.ids)},
        "merges": {"before": len(model.vocabulary.bpe.merges), "after": len(written.vocabulary.bpe.merges)},
        "bytes": {"before": model.bytes, "after": written.bytes, "saved": model.bytes - written.bytes},
        **{name: value for name, value in chosen.items() if name not in ("tokens", "problem")},
        "attempts": attempts,
        "model_sha256": written.weights.sha256,
    }
