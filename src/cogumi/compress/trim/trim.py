"""Stage `trim`: a model without the tokens that its texts hardly ever use (SPEC A11).

The tokens that cover nearly all of a corpus stay, with those that no text model should be without (`essential`) and
their merge parents (`bpe`); the rest goes, everywhere (`remap`). Nothing is trained. Words that lost their token are
cut into more of them, which the model never saw so: tokens per word and perplexity per byte tell what that costs. Where
it costs too much, more is kept; where nothing asked for costs little enough, the model is given back as it came.

An adapter of linear layers fits the trimmed model as it is: it has no rows per token.
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
    """`covers` are shares of the corpus's tokens, tried in order until all limits hold; `size` asks for so many tokens
    instead. The corpus is the training split and the texts in `corpus`; what is chosen is measured on the selection
    split and the texts in `measure`: files, or folders of .txt, .md and .py files.

    Limits: shares of ASCII lines and of others that must come back as they were, and by how much, as shares, tokens per
    word and the perplexity per byte of the selection split's answers may rise.
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
    """Answers of the selection split: nats per token (`loss`) and per byte, and the share given word for word."""

    loss: float
    nats_per_byte: float
    exact: float

    @classmethod
    def of(cls, folder: Path, rows: Sequence[Row], size: int) -> Quality:
        """Judge a model on rows whose answers are `size` bytes of text."""
        figures = judge_answers(applied(load(folder)), rows)
        return cls(figures["loss"], figures["loss"] * sum(row.weight for row in rows) / size, figures["exact"])


def compare(before: Model, after: Model, examples: Sequence[Example]) -> tuple[Quality, Quality]:
    """Both models' quality, on the examples that fit the context of both."""
    rows = [make_rows(examples, model.vocabulary.tokenizer, model.context) for model in (before, after)]
    shared = {row.id for row in rows[0]} & {row.id for row in rows[1]}
    size = sum(len(example.answer.encode()) for example in examples if example.id in shared)
    if not size:
        raise DataError("no answer of the selection split fits the model's context; give shorter examples")
    one, other = ([row for row in some if row.id in shared] for some in rows)
    return Quality.of(before.folder, one, size), Quality.of(after.folder, other, size)


def text_problem(config: Config, found: Fertility) -> str | None:
    """Which limit on texts is broken, or None."""
    for kind, share, least in (("ASCII", found.ascii, config.ascii), ("other", found.unicode, config.unicode)):
        if share < least:
            return f"{share:.3%} of {kind} lines come back as they were, below {least:.3%}"
    if found.rise > config.tokens_per_word:
        return f"tokens per word rise by {found.rise:.1%}, above {config.tokens_per_word:.1%}"
    return None


def quality_problem(config: Config, before: Quality, after: Quality) -> str | None:
    """Whether perplexity per byte rises above the limit, or is no number any more; None if not."""
    rise = exp(after.nats_per_byte - before.nats_per_byte) - 1
    if rise <= config.perplexity:
        return None
    return f"perplexity per byte rises by {rise:.1%}, above {config.perplexity:.1%}"


@dataclass(frozen=True, slots=True)
class Sample:
    """What a trimmed model is measured on, and the tokens per word that the model takes for it before."""

    examples: Sequence[Example]
    texts: Sequence[str]
    tokens_per_word: float


def attempt(config: Config, model: Model, kept: set[int], sample: Sample, out: Path) -> dict[str, Any]:
    """Write the model with these ids to `out`, measure it, and say under `problem` which limit is broken, or None.

    One that fails on texts is not judged by its answers.
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
    """What may stay, in the order in which it is tried, and how it was come by."""
    if "tokenizer" in inputs:
        folder = inputs["tokenizer"].path
        kept = model.vocabulary.following(folder)
        if not model.named <= kept:
            raise DataError(f"{folder} lacks a token that a config of {model.folder} names; trim without following it")
        yield {"asked": "followed"}, kept
        return
    train = iterate_examples(split_path(inputs["examples"].path, "train"))
    texts = read_texts(context.root / path for path in config.corpus)
    choice = Choice.by(model.vocabulary, train, texts, model.named)
    for asked in config.covers if config.size is None else (config.size,):
        kept = choice.of(asked)
        yield {"asked": asked, "always": len(choice.always), "coverage": choice.coverage(kept)}, kept


def estimate(config: Config, given: Given) -> Estimate:
    """A model of so many ids as are asked for; of all, if the corpus decides."""
    model = given.find("model", ModelFacts)
    if config.size is None:
        return Estimate((model,), notes=(NOT_COUNTED, UNKNOWN_IDS))
    if model:
        ids = min(config.size, model.shape.vocabulary)
        model = replace(model, shape=replace(model.shape, vocabulary=ids))
    return Estimate((model,), notes=(NOT_COUNTED,))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`model`, `examples`, optionally `tokenizer` -> a model folder.

    `tokenizer` is the trimmed folder of a model that this one shares its tokenizer with (a draft's base): this model
    gets the same vocabulary, whatever the limits, because the two are of use together only.
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
    given, reason = Model.load(out), attempts[-1]["problem"]
    told = {"tokens": len(given.vocabulary.bpe.ids), "bytes saved": model.bytes - given.bytes}
    context.progress(len(attempts), len(attempts), told)
    chosen = attempts[-1] if reason is None else {}
    return {
        "rolled_back": reason is not None,
        "reason": reason,
        "tokens": {"before": len(model.vocabulary.bpe.ids), "after": len(given.vocabulary.bpe.ids)},
        "merges": {"before": len(model.vocabulary.bpe.merges), "after": len(given.vocabulary.bpe.merges)},
        "bytes": {"before": model.bytes, "after": given.bytes, "saved": model.bytes - given.bytes},
        **{name: value for name, value in chosen.items() if name not in ("tokens", "problem")},
        "attempts": attempts,
        "model_sha256": given.weights.sha256,
    }
