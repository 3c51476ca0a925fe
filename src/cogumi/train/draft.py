"""Stage `draft`: a small model that predicts the base's answers and the difficulty of questions (SPEC C5).

It learns to generate from the base's own responses to easy questions. Hard questions train only the difficulty head, so
that the draft does not become confident in answers it cannot know. A language-model loss with a small weight on the
questions makes its question perplexity informative if it is trained from scratch. `answers: dataset` is the control
that learns the reference answers instead of the base's responses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from cogumi.bundle.format import DIFFICULTY
from cogumi.core.errors import TrainingError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize, ModelFacts, TokenizerFacts
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.examples import is_easy, read_examples, split_path
from cogumi.data.responses import Response, read_responses
from cogumi.models.draft_heads import DraftModel
from cogumi.models.folders import Shape, build, load, locate, parameters, save
from cogumi.models.tokenization import HFTokenizer, Row
from cogumi.train import batches
from cogumi.train.batches import IGNORE, Batch
from cogumi.train.curves import curves_picture
from cogumi.train.loop import Apply, LoopConfig, Loss, train
from cogumi.train.losses import answer_logits, divergence, labelled_logits, token_nats
from cogumi.train.training_cost import model_to_train, training_estimate
from cogumi.train.validation import applied, mean_figures, passes

VERSION = 1
KIND = "model"
INPUTS = {"examples": "examples", "responses": "responses", "model": "model"}
TRAINS = True

_MAX_NATS = 4.0  # otherwise the squared perplexity error of an untrained draft would dominate the other losses
_VALIDATE_EVERY = 16  # every 16th training question is used for validation instead of training


_SHAPE = Shape(hidden=96, layers=2, heads=3, feed_forward=256)


class Config(BaseModel):
    """Answerable questions up to difficulty `easy_up_to` are easy, and of those without a level the ones that the base
    answered correctly.

    With `distill` the draft learns the base's distribution over each token of its response (T = 1) instead of the
    token.
    """

    model_config = ConfigDict(extra="forbid")
    init: str = "scratch"
    shape: Shape = _SHAPE
    easy_up_to: int = Field(2, ge=1, le=5)
    answers: Literal["base", "dataset"] = "base"
    distill: bool = False
    generation_weight: float = Field(1.0, ge=0)
    difficulty_weight: float = Field(1.0, ge=0)
    alignment_weight: float = Field(0.1, ge=0)
    question_weight: float = Field(0.3, ge=0)
    loop: LoopConfig = LoopConfig()

    @field_validator("shape", mode="before")
    @classmethod
    def _completed(cls, shape: Any) -> Any:
        """A shape given in part keeps the draft's own defaults, not those of a base."""
        return {**_SHAPE.model_dump(), **shape} if isinstance(shape, Mapping) else shape


@dataclass(frozen=True, slots=True)
class DraftRow:
    """A question with or without an answer to learn; `perplexity` of the base's own response, 0 without an answer."""

    row: Row
    easy: bool
    perplexity: float

    @property
    def id(self) -> str:
        """Id of the example."""
        return self.row.id

    @property
    def size(self) -> int:
        """Number of tokens."""
        return self.row.size

    @property
    def weight(self) -> float:
        """All rows have equal weight."""
        return 1.0


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """A batch of draft rows: token ids, `easy` `[rows]` 0/1 and `perplexity` `[rows]`."""

    batch: Batch
    easy: Tensor
    perplexity: Tensor

    def to(self, device: torch.device) -> DraftBatch:
        """The same batch on a device."""
        return DraftBatch(self.batch.to(device), self.easy.to(device), self.perplexity.to(device))


def collate(rows: Sequence[DraftRow], index: Sequence[int]) -> DraftBatch:
    """Pad the chosen rows into one batch."""
    chosen = [rows[i] for i in index]
    return DraftBatch(
        batches.collate([row.row for row in chosen], range(len(chosen))),
        torch.tensor([float(row.easy) for row in chosen]),
        torch.tensor([row.perplexity for row in chosen]),
    )


def draft_rows(
    examples: Sequence[Example], responses: Mapping[str, Response], tokenizer: HFTokenizer, config: Config
) -> list[DraftRow]:
    """One row per example; only easy questions with a finished response of the base get an answer."""
    found = []
    for example in examples:
        prompt = tokenizer.chat(example.messages)
        response = responses.get(example.id)
        easy = is_easy(example, config.easy_up_to, response is not None and response.correct)
        target = response if response and response.finished and easy else None
        text = example.answer if config.answers == "dataset" else target.output if target else ""
        answer = tokenizer.answer(text) if target else []
        row = Row((*prompt, *answer), len(prompt), example.id)
        found.append(DraftRow(row, easy, target.perplexity if target else 0.0))
    return found


def row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of the values of each row, 0 for a row without values: `[n]`, row numbers `[n]` -> `[rows]`."""
    zeros = torch.zeros(rows, device=values.device)
    return zeros.index_add(0, row, values) / zeros.index_add(0, row, torch.ones_like(values)).clamp(min=1)


def draft_loss(config: Config, base: Any = None) -> Loss:
    """The weighted sum of four losses: generation, difficulty, perplexity alignment, question.

    With a teacher `base`, generation is the divergence from its distribution.
    """

    def loss(model: DraftModel, rows: DraftBatch) -> tuple[Tensor, dict[str, float]]:
        batch = rows.batch
        hidden = model.hidden(batch.ids)
        logit = model.easy_logit(hidden, batch.starts - 1)
        difficulty = binary_cross_entropy_with_logits(logit, rows.easy)
        position = torch.arange(batch.ids.shape[1], device=batch.ids.device)
        question_labels = torch.where(position < batch.starts[:, None], batch.ids, IGNORE)
        question = token_nats(model.lm.lm_head, hidden, question_labels)[0].mean()
        total = config.difficulty_weight * difficulty + config.question_weight * question
        zero = torch.zeros(())  # every process must return the same figures, even without an easy question
        parts = {"difficulty": difficulty, "question": question, "generation": zero, "alignment": zero}
        logits, target, row = labelled_logits(model.lm.lm_head, hidden, batch.labels)
        if len(target):
            nats = cross_entropy(logits, target, reduction="none")
            generation = nats.mean() if base is None else divergence(logits, _teacher_logits(base, batch))
            answered = torch.unique(row)
            mean = row_means(nats, row, len(batch.ids))[answered]
            expected = rows.perplexity[answered]
            alignment = (mean.clamp(max=_MAX_NATS).exp() - expected).square().mean()
            total = total + config.generation_weight * generation + config.alignment_weight * alignment
            parts |= {"generation": generation, "alignment": alignment}
        return total, {"loss": float(total.detach()), **{k: float(v.detach()) for k, v in parts.items()}}

    return loss


@torch.no_grad()
def _teacher_logits(base: Any, batch: Batch) -> Tensor:
    return answer_logits(base, batch)[0]


def judge(model: DraftModel, rows: Sequence[DraftRow]) -> dict[str, float]:
    """Accuracy and AUROC of difficulty, share of answer tokens predicted, error of the perplexity."""
    from sklearn.metrics import roc_auc_score

    logits, easy, agreed, total, errors = [], [], 0, 0, []
    for index in passes(rows):
        logit, right, error = applied(model)(_judged, collate(rows, index))
        logits.append(logit.cpu())
        easy += [rows[i].easy for i in index]
        agreed, total = agreed + int(right.sum()), total + len(right)
        errors.append(error.cpu())
    p_easy = torch.cat(logits).sigmoid()
    return {
        "difficulty_accuracy": round(float(((p_easy > 0.5) == torch.tensor(easy)).float().mean()), 4),
        "difficulty_auroc": round(float(roc_auc_score(easy, p_easy.numpy())), 4),
        "foreseen": round(agreed / max(total, 1), 4),
        "alignment_error": round(float(torch.cat(errors).mean()), 4),
    }


def _judged(model: DraftModel, rows: DraftBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Difficulty logits `[rows]`, answer tokens predicted `[n]`, error of the perplexity of rows with an answer."""
    batch = rows.batch
    hidden = model.hidden(batch.ids)
    logits, target, row = labelled_logits(model.lm.lm_head, hidden, batch.labels)
    answered = torch.unique(row)
    mean = row_means(cross_entropy(logits, target, reduction="none"), row, len(batch.ids))[answered]
    error = (mean.exp() - rows.perplexity[answered]).abs()
    return model.easy_logit(hidden, batch.starts - 1), logits.argmax(-1) == target, error


def estimate(config: Config, given: Given) -> Estimate:
    """The trained draft with its difficulty head, and the cost of its training."""
    base = given.find("model", ModelFacts)
    tokenizer = TokenizerFacts(base.tokenizer, base.shape.vocabulary, base.own) if base else None
    draft = model_to_train(config.init, config.shape, tokenizer, given.root)
    if draft is None:
        return Estimate()
    found = training_estimate(given, draft, config.loop, whole_rows=config.question_weight > 0)
    notes, problems = _bridge(base, draft)
    if base and config.init == "scratch":
        problems += _larger(draft.shape.parameters, base.shape.parameters)
    head = draft.shape.hidden + 1
    return replace(
        found,
        facts=(draft, FileFacts({DIFFICULTY: FileSize(4 * head + 144)})),  # fp32 behind a safetensors header
        cost=replace(found.cost, trained=(found.cost.trained or 0) + head),
        notes=(*found.notes, *notes),
        problems=(*found.problems, *problems),
    )


def _bridge(base: ModelFacts | None, draft: ModelFacts) -> tuple[list[str], list[str]]:
    """Notes and problems of a draft whose vocabulary differs from the base's."""
    if base is None or base.tokenizer == draft.tokenizer:
        return [], []
    problems = [
        f"the tokenizer {one.tokenizer} is not byte-level, so drafts cannot be bridged; use "
        "a draft with the base's tokenizer"
        for one in (base, draft)
        if not one.bytewise
    ]
    return [f"tokenizer {draft.tokenizer}, the base's is {base.tokenizer}: the engine drafts through text"], problems


def _larger(draft: int, base: int) -> list[str]:
    """A line if a draft of so many weights is larger than its base."""
    if draft <= base:
        return []
    return [f"the draft has {draft:,} weights, more than the base with {base:,}; give a smaller `shape`"]


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses`, `model` (the base) -> a model folder and difficulty.safetensors."""
    torch.set_num_threads(context.threads)
    folder = inputs["model"].path if config.init == "scratch" else locate(config.init, context.root)
    tokenizer = HFTokenizer.load(folder)
    language_model = build(config.shape, tokenizer, context.seed) if config.init == "scratch" else load(folder)
    if config.init == "scratch":
        for problem in _larger(parameters(language_model), parameters(load(inputs["model"].path))):
            raise TrainingError(problem)
    torch.manual_seed(context.seed)
    model = DraftModel(language_model)
    responses = read_responses(inputs["responses"].path)
    examples = read_examples(split_path(inputs["examples"].path, "train"))
    like_base = config.model_copy(update={"answers": "base"})
    validation = draft_rows(examples[::_VALIDATE_EVERY], responses, tokenizer, like_base)
    training = draft_rows([e for i, e in enumerate(examples) if i % _VALIDATE_EVERY], responses, tokenizer, config)
    base = load(inputs["model"].path).eval().requires_grad_(False) if config.distill else None

    def validate(apply: Apply) -> dict[str, float]:
        return mean_figures(apply, validation, draft_loss(config), collate)

    at = train(model, training, draft_loss(config, base), config.loop, out, context, validate, collate)
    save(model.lm, folder, out)
    model.save_difficulty(out / DIFFICULTY)
    curves_picture(out / "curves.png", at.losses, ("generation", "difficulty", "question", "alignment"), "loss")
    return {
        "parameters": parameters(model),
        "rows": len(training),
        "easy_rows": sum(row.easy for row in training),
        "answers": config.answers,
        "steps": at.step,
        "stopped": at.stopped,
        "tokens": at.tokens,
        **judge(model, validation),
        "curve": {"training": at.losses, "selection": at.validations},
        "model_sha256": sha256(out / "model.safetensors"),
    }
