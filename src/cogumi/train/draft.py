"""Stage `draft`: a small model that foresees the base and says which questions are easy (SPEC C5).

It learns to generate from the base's own responses, on easy questions only; hard questions teach it nothing but that
they are hard, so that it never becomes confident about answers it cannot know. A light language-model loss on the
questions themselves makes its question perplexity mean something when it is trained from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from cogumi.artifact import sha256
from cogumi.data.examples import is_easy, read_examples, split_path
from cogumi.data.responses import Response, read_responses
from cogumi.models.build import Shape, build, load, locate, parameters, save
from cogumi.models.heads import DraftModel
from cogumi.models.text import HFTokenizer
from cogumi.stage import Context
from cogumi.train.batches import IGNORE, Batch, Row, collate
from cogumi.train.loop import LoopConfig, Loss, train
from cogumi.train.losses import token_nats
from cogumi.types import Artifact, Example

VERSION = 1
KIND = "model"

_MAX_NATS = 4.0  # the squared perplexity error of an untrained draft would drown every other loss
_VALIDATE_EVERY = 16  # one in so many training questions judges the draft instead of teaching it


class Config(BaseModel):
    """Questions up to difficulty `easy_up_to` with an answer are easy. Loss weights as in SPEC C5."""

    model_config = ConfigDict(extra="forbid")
    init: str = "scratch"
    shape: Shape = Shape(hidden=96, layers=2, heads=3, feed_forward=256)
    easy_up_to: int = Field(2, ge=1, le=5)
    generation_weight: float = Field(1.0, ge=0)
    difficulty_weight: float = Field(1.0, ge=0)
    alignment_weight: float = Field(0.1, ge=0)
    question_weight: float = Field(0.3, ge=0)
    loop: LoopConfig = LoopConfig()


@dataclass(frozen=True, slots=True)
class Lessons:
    """Rows with what each teaches: `easy` `[rows]` 0/1; `perplexity` `[rows]` of the base's response, 0 where hard."""

    rows: list[Row]
    easy: Tensor
    perplexity: Tensor


def lessons(
    examples: Sequence[Example], responses: Mapping[str, Response], tokenizer: HFTokenizer, easy_up_to: int
) -> Lessons:
    """Easy questions carry the base's response where there is one, all others nothing but the question."""
    rows, easy, perplexity = [], [], []
    for example in examples:
        prompt = tokenizer.chat(example.messages)
        response = responses.get(example.id)
        taught = response if response and response.finished and is_easy(example, easy_up_to) else None
        answer = tokenizer.answer(taught.output) if taught else []
        rows.append(Row((*prompt, *answer), len(prompt)))
        easy.append(float(is_easy(example, easy_up_to)))
        perplexity.append(taught.perplexity if taught else 0.0)
    return Lessons(rows, torch.tensor(easy), torch.tensor(perplexity))


def row_means(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Mean of the values of each row, 0 where a row has none: `[n]`, `[n]` -> `[rows]`."""
    zeros = torch.zeros(rows)
    return zeros.index_add(0, row, values) / zeros.index_add(0, row, torch.ones_like(values)).clamp(min=1)


def draft_loss(config: Config, taught: Lessons) -> Loss:
    """The weighted sum of four losses: generation, difficulty, perplexity alignment, question."""

    def loss(model: DraftModel, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        hidden = model.hidden(batch.ids)
        easy = taught.easy[batch.index]
        logit = model.easy_logit(hidden, batch.starts - 1)
        difficulty = binary_cross_entropy_with_logits(logit, easy)
        position = torch.arange(batch.ids.shape[1])
        asked = torch.where(position < batch.starts[:, None], batch.ids, IGNORE)
        question = token_nats(model.lm.lm_head, hidden, asked)[0].mean()
        total = config.difficulty_weight * difficulty + config.question_weight * question
        figures = {"difficulty": float(difficulty.detach()), "question": float(question.detach())}
        nats, row = token_nats(model.lm.lm_head, hidden, batch.labels)
        if len(nats):
            generation = nats.mean()
            speaking = torch.unique(row)
            mean = row_means(nats, row, len(batch.ids))[speaking]
            expected = taught.perplexity[batch.index][speaking]
            alignment = (mean.clamp(max=_MAX_NATS).exp() - expected).square().mean()
            total = total + config.generation_weight * generation + config.alignment_weight * alignment
            figures |= {"generation": float(generation.detach()), "alignment": float(alignment.detach())}
        return total, {"loss": float(total.detach()), **figures}

    return loss


@torch.no_grad()
def judge(model: DraftModel, taught: Lessons, batch: int = 256) -> dict[str, float]:
    """Difficulty accuracy and AUROC, share of the base's tokens foreseen, error of the perplexity."""
    from sklearn.metrics import roc_auc_score

    model.eval()
    logits, agreed, total, errors = [], 0, 0, []
    for at in range(0, len(taught.rows), batch):
        chunk = collate(taught.rows, range(at, min(at + batch, len(taught.rows))))
        hidden = model.hidden(chunk.ids)
        logits.append(model.easy_logit(hidden, chunk.starts - 1))
        row, position = torch.nonzero(chunk.labels[:, 1:] != IGNORE, as_tuple=True)
        foreseen = model.lm.lm_head(hidden[row, position]).argmax(-1) == chunk.labels[:, 1:][row, position]
        agreed, total = agreed + int(foreseen.sum()), total + len(row)
        nats, row = token_nats(model.lm.lm_head, hidden, chunk.labels)
        speaking = torch.unique(row)
        mean = row_means(nats, row, len(chunk.ids))[speaking]
        errors.append((mean.exp() - taught.perplexity[chunk.index][speaking]).abs())
    p_easy = torch.cat(logits).sigmoid()
    return {
        "difficulty_accuracy": round(float(((p_easy > 0.5) == (taught.easy > 0.5)).float().mean()), 4),
        "difficulty_auroc": round(float(roc_auc_score(taught.easy.numpy(), p_easy.numpy())), 4),
        "foreseen": round(agreed / max(total, 1), 4),
        "alignment_error": round(float(torch.cat(errors).mean()), 4),
    }


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples`, `responses`, `model` (the base, for its tokenizer) -> a model folder and difficulty.safetensors."""
    torch.set_num_threads(context.threads)
    folder = inputs["model"].path if config.init == "scratch" else locate(config.init, context.root)
    tokenizer = HFTokenizer.load(folder)
    language_model = build(config.shape, tokenizer, context.seed) if config.init == "scratch" else load(folder)
    torch.manual_seed(context.seed)
    model = DraftModel(language_model)
    responses = read_responses(inputs["responses"].path)
    asked = read_examples(split_path(inputs["examples"].path, "train"))
    judging = lessons(asked[::_VALIDATE_EVERY], responses, tokenizer, config.easy_up_to)
    teaching = [e for i, e in enumerate(asked) if i % _VALIDATE_EVERY]
    taught = lessons(teaching, responses, tokenizer, config.easy_up_to)
    loss = draft_loss(config, judging)
    everything = range(len(judging.rows))

    @torch.no_grad()
    def validate(module: Any) -> float:
        module.eval()
        return float(loss(module, collate(judging.rows, everything))[0])

    at = train(model, taught.rows, draft_loss(config, taught), config.loop, out, context, validate)
    save(model.lm, folder, out)
    model.save_difficulty(out / "difficulty.safetensors")
    return {
        "parameters": parameters(model),
        "rows": len(taught.rows),
        "easy_rows": int(taught.easy.sum()),
        "steps": at.step,
        "tokens": at.tokens,
        **judge(model, judging),
        "curve": {"training": at.losses, "selection": at.validations},
        "model_sha256": sha256(out / "model.safetensors"),
    }
