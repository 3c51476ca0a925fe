"""Losses as functions `(model, batch) -> (loss, figures)` for the training loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, pad

from cogumi.models.answer_match import exact, language_model
from cogumi.train.autocast import missing
from cogumi.train.batches import IGNORE, Batch
from cogumi.train.loop import Loss


def labelled_logits(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions of all labelled tokens: logits `[n, vocabulary]`, tokens `[n]`, row numbers `[n]`.

    `hidden` `[rows, positions, width]`, `labels` `[rows, positions]`. The head runs on the positions before these
    tokens only.
    """
    target = labels[:, 1:]
    row, position = torch.nonzero(target != IGNORE, as_tuple=True)
    states = hidden[row, position]
    logits = head(pad(states, (0, 0, 0, missing(len(states), states.device.type))))
    return logits[: len(states)], target[row, position], row


def token_nats(head: Any, hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each labelled token `[n]`, and its row number `[n]`."""
    logits, target, row = labelled_logits(head, hidden, labels)
    return cross_entropy(logits, target, reduction="none"), row


def answer_logits(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """`labelled_logits` of the answer tokens; prompts have no labels, so that the head does not run on them."""
    core, batch = language_model(model), batch.in_tiles()
    given = {"input_ids": batch.ids} if batch.states is None else {"inputs_embeds": batch.states.to(core.dtype)}
    return labelled_logits(core.lm_head, core.model(**given, use_cache=False).last_hidden_state, batch.labels)


def answer_loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Mean nats per answer token."""
    logits, target, _ = answer_logits(model, batch)
    loss = cross_entropy(logits, target)
    return loss, {"loss": float(loss.detach())}


def divergence(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean KL(teacher || model) in nats per token of logits `[n, vocabulary]`, both softened by the temperature.

    It is multiplied by the squared temperature, so that gradients keep their scale (Hinton et al., 1503.02531).
    """
    student, target = ((side / temperature).log_softmax(-1) for side in (logits, teacher))
    return kl_div(student, target, reduction="batchmean", log_target=True) * temperature**2


def distillation(teacher: Any, temperature: float = 1.0, answers: float = 0.0) -> Loss:
    """`divergence` of a model from a frozen teacher over answer tokens.

    The cross-entropy of the reference answers has the share `answers` of the loss.
    """

    def loss(model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            teacher_logits = answer_logits(teacher.to(batch.ids.device), batch)[0]
        logits, target, _ = answer_logits(model, batch)
        total = divergence(logits, teacher_logits, temperature)
        if answers:
            total = (1 - answers) * total + answers * cross_entropy(logits, target)
        return total, {"loss": float(total.detach())}

    return loss


def answer_figures(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Per row: nats of its answer, and whether greedy decoding gives it exactly; `[rows]` each."""
    logits, target, row = answer_logits(model, batch)
    rows = torch.zeros(len(batch.ids), device=logits.device)
    nats = rows.index_add(0, row, cross_entropy(logits, target, reduction="none").float())
    return nats, exact(logits, target, row, len(rows))
