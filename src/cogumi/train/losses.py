"""Losses as plain functions `(model, batch) -> (loss, figures)`; a loop takes any of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from cogumi.models.answer_match import exact, language_model
from cogumi.train.batches import IGNORE, Batch
from cogumi.train.loop import Loss


def labelled_logits(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the position before each labelled token says about it: logits `[n, vocabulary]`, tokens `[n]`, rows `[n]`.

    `hidden` `[rows, positions, width]`, `labels` `[rows, positions]`. The head runs on these positions only.
    """
    target = labels[:, 1:]
    row, position = torch.nonzero(target != IGNORE, as_tuple=True)
    return head(hidden[row, position]), target[row, position], row


def token_nats(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each labelled token, `[n]`, and the row of each."""
    logits, target, row = labelled_logits(head, hidden, labels)
    return cross_entropy(logits, target, reduction="none"), row


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`labelled_logits` of the answer tokens; prompts are read, never learned."""
    core = language_model(model)
    return labelled_logits(core.lm_head, core.model(input_ids=batch.ids).last_hidden_state, batch.labels)


def answer_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token."""
    logits, target, _ = answer_logits(model, batch)
    loss = cross_entropy(logits, target)
    return loss, {"loss": float(loss.detach())}


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || model) in nats per token of logits `[n, vocabulary]`, both softened by the temperature.

    Times its square, so that gradients keep their size (Hinton et al., 1503.02531).
    """
    said, wanted = ((side / temperature).log_softmax(-1) for side in (logits, teacher))
    return kl_div(said, wanted, reduction="batchmean", log_target=True) * temperature**2


def distillation(teacher: Any, temperature: float = 1.0, answers: float = 0.0) -> Loss:
    """`divergence` of a model from the teacher over answer tokens; the teacher is not trained.

    The share `answers` of the loss is that of the reference answers.
    """

    def loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted = answer_logits(teacher.to(batch.ids.device), batch)[0]
        logits, target, _ = answer_logits(model, batch)
        found = divergence(logits, wanted, temperature)
        if answers:
            found = (1 - answers) * found + answers * cross_entropy(logits, target)
        return found, {"loss": float(found.detach())}

    return loss


def answer_figures(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per row: nats of its answer, and whether greedy decoding would give it word for word; `[rows]` each."""
    logits, target, row = answer_logits(model, batch)
    rows = torch.zeros(len(batch.ids), device=logits.device)
    nats = rows.index_add(0, row, cross_entropy(logits, target, reduction="none").float())
    return nats, exact(logits, target, row, len(rows))
