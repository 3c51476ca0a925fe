"""Stage `escalation`: classifier of dissatisfied follow-ups (SPEC F7), a sentence encoder distilled to an LSTM.

The teacher is a sentence encoder with one logit on its mean state, fine-tuned on synthetic dialogues; it then labels
other dialogues. The student learns from more dialogues than the slow teacher can label; their true labels are mixed
with the teacher's probabilities where these exist (Hinton et al. 2015).
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from cogumi.cascade.dissatisfaction import FILE, MARKS, Escalation, describe, encode, last_turn, numbered
from cogumi.core.errors import RecipeError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import FileFacts, FileSize
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.followups.dialogues import Dialogue, Set, draw
from cogumi.models.encoder import DEFAULT, Encoder, load_encoder
from cogumi.models.followup_lstm import HIDDEN, WIDTH, FollowUpNet, export, word_vectors
from cogumi.train.fit_followup_net import batches, best_threshold, fit

VERSION = 2
KIND = "escalation"
INPUTS: dict[str, str] = {}
_CHARACTERS = 300
_BATCH = 16
_JUDGED: tuple[Set, ...] = ("selection", "heldout")


class Config(BaseModel):
    """`model` is the default encoder, a folder or a Hub id; its last `layers` layers are tuned for `epochs` on
    `teacher_rows` dialogues, and it labels `soft_rows` others. The student learns `rows` dialogues including those, for
    `student_epochs`; `soft` is the weight of a perfect teacher's probabilities, less for a worse one. The defaults take
    half a minute on one core; six layers and 2400 rows give a good teacher and take five minutes. The cascade acts on a
    threshold with at most the share `false_alarms` of satisfied users in the selection set above it.
    """

    model_config = ConfigDict(extra="forbid")
    model: str = DEFAULT
    layers: int = Field(2, ge=1)
    epochs: int = Field(3, ge=1)
    teacher_lr: float = Field(3e-4, gt=0)
    teacher_rows: int = Field(128, ge=_BATCH)
    soft_rows: int = Field(128, ge=1)
    soft: float = Field(0.5, ge=0, le=1)
    rows: int = Field(14000, ge=2)
    student_epochs: int = Field(3, ge=1)
    width: int = Field(WIDTH, ge=2)
    hidden: int = Field(HIDDEN, ge=2)
    dropout: float = Field(0.2, ge=0, lt=1)
    lr: float = Field(4e-3, gt=0)
    false_alarms: float = Field(0.05, gt=0, lt=1)
    judged: int = Field(600, ge=2, description="dialogues of selection and of heldout; the teacher reads 100 of each")


def estimate(config: Config, given: Given) -> Estimate:
    """The file of the net, with its size in the recipe tiny."""
    return Estimate((FileFacts({FILE: FileSize(2_727_549, 0.75)}),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """No inputs -> escalation.onnx; metrics: accuracy of teacher and student, bytes, milliseconds per turn."""
    torch.set_num_threads(1)  # with several threads the order of sums, and so the result, varies
    seed = context.seed
    dialogues = draw("train", config.teacher_rows + config.rows, seed)
    teacher_rows, rest = dialogues[: config.teacher_rows], dialogues[config.teacher_rows :]
    judged = {name: draw(name, config.judged, seed) for name in _JUDGED}
    encoder, tokenizer = load_encoder(config.model, context.root)
    words, table, scale = word_vectors(encoder, tokenizer, config.width)  # before the teacher is tuned
    targets = _labels(rest)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        teacher = Teacher(encoder, tokenizer, config.layers)
        teacher.learn(teacher_rows, config.epochs, config.teacher_lr, seed)
        soft_labels = teacher.judge(rest[: config.soft_rows])
        teacher_accuracy = {name: _accuracy(teacher.judge(rows[:100]), rows[:100]) for name, rows in judged.items()}
        torch.manual_seed(seed)
        net = FollowUpNet(table, scale, MARKS, config.hidden, config.dropout)
    weight = config.soft * max(0.0, 2 * teacher_accuracy["selection"] - 1)  # 0 at chance accuracy
    targets[: len(soft_labels)] += weight * (soft_labels - targets[: len(soft_labels)])
    numbers = numbered(words)
    rows = [encode(turn, numbers) for turn in (last_turn(d.messages) for d in rest) if turn]
    fit(
        net,
        rows,
        targets,
        epochs=config.student_epochs,
        lr=config.lr,
        seed=seed,
        progress=lambda done, total, loss: context.progress(done, total, {"loss": loss}),
    )
    path = out / FILE
    export(net, path, describe(words, 0.5, 0.5))
    p = _judge(Escalation(path), judged["selection"])
    dissatisfied = _labels(judged["selection"]) > 0
    threshold = best_threshold(p, dissatisfied, lambda labels, predicted: float(np.mean(labels == predicted)))
    sure = float(np.quantile(p[~dissatisfied], 1 - config.false_alarms, method="higher"))
    export(net, path, describe(words, threshold, max(threshold, sure)))
    return {
        "rows": {"teacher": config.teacher_rows, "soft": config.soft_rows, "student": config.rows},
        "epochs": {"teacher": config.epochs, "student": config.student_epochs},
        "threshold": threshold,
        "sure": max(threshold, sure),
        "teacher_accuracy": teacher_accuracy,
        "teacher_weight": weight,
        **_report(Escalation(path), judged, path),
    }


def _report(net: Escalation, judged: Mapping[Set, Sequence[Dialogue]], path: Path) -> dict[str, Any]:
    """Figures of the exported file: accuracy, bytes, milliseconds per turn."""
    found = {name: _judge(net, rows) for name, rows in judged.items()}
    hits: dict[str, list[bool]] = {}
    for dialogue, p in zip(judged["heldout"], found["heldout"], strict=True):
        hits.setdefault(dialogue.kind, []).append(dialogue.dissatisfied == (p >= net.threshold))
    turn = judged["heldout"][0].messages
    seconds = timeit.repeat(lambda: net.dissatisfied(turn), number=10, repeat=20)
    return {
        "accuracy": {name: _accuracy(p, judged[name], net.threshold) for name, p in found.items()},
        "heldout_by_kind": {kind: float(np.mean(of)) for kind, of in sorted(hits.items())},
        "bytes": path.stat().st_size,
        "milliseconds": 1000 * statistics.median(seconds) / 10,
    }


class Teacher:
    """An encoder whose last `layers` layers are fine-tuned, with one logit on the mean of its last hidden states."""

    def __init__(self, encoder: Encoder, tokenizer: Any, layers: int) -> None:
        self._model, self._tokenizer = encoder.model, tokenizer
        stack = getattr(getattr(self._model, "encoder", None), "layer", None)
        if stack is None:
            name = type(self._model).__name__
            raise RecipeError(f"{name} cannot be the teacher; give a BERT-like sentence encoder as 'model'")
        self._model.requires_grad_(False)
        for layer in stack[-layers:]:
            layer.requires_grad_(True)
        self._head = nn.Linear(self._model.config.hidden_size, 1)  # type: ignore[union-attr, arg-type]

    def learn(self, dialogues: Sequence[Dialogue], epochs: int, lr: float, seed: int) -> None:
        """AdamW, one cycle; the head's learning rate is ten times that of the layers."""
        rows, labels = [self._row(dialogue) for dialogue in dialogues], torch.from_numpy(_labels(dialogues))
        tuned = [p for p in self._model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [{"params": tuned}, {"params": list(self._head.parameters())}]
        optimizer = torch.optim.AdamW(groups)
        steps = epochs * -(-len(rows) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, 10 * lr], total_steps=steps, pct_start=0.1)
        order = np.random.default_rng(seed)
        for _ in range(epochs):
            for chosen in batches([len(ids) for ids, _ in rows], _BATCH, order):
                logits = self._logits([rows[i] for i in chosen])
                loss = nn.functional.binary_cross_entropy_with_logits(logits, labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()

    def judge(self, dialogues: Sequence[Dialogue]) -> NDArray[np.float32]:
        """P(dissatisfied) [dialogues]."""
        rows = [self._row(dialogue) for dialogue in dialogues]
        p = np.empty(len(rows), dtype=np.float32)
        by_length = np.argsort([len(ids) for ids, _ in rows], kind="stable")
        with torch.no_grad():
            for i in range(0, len(rows), _BATCH):
                chosen = by_length[i : i + _BATCH]
                p[chosen] = torch.sigmoid(self._logits([rows[k] for k in chosen])).numpy()
        return p

    def _row(self, dialogue: Dialogue) -> tuple[list[int], list[int]]:
        question, answer, follow_up = (message.content[:_CHARACTERS] for message in dialogue.messages)
        encoding = self._tokenizer.encode(f"{question} {answer}", follow_up)
        return encoding.ids, encoding.type_ids

    def _logits(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        ids, types, mask = (
            nn.utils.rnn.pad_sequence([torch.tensor(values) for values in column], batch_first=True)
            for column in zip(*((ids, types, [1] * len(ids)) for ids, types in rows), strict=True)
        )
        states = self._model(input_ids=ids, token_type_ids=types, attention_mask=mask).last_hidden_state
        mean = (states * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
        logits: Tensor = self._head(mean)[:, 0]
        return logits


def _labels(dialogues: Sequence[Dialogue]) -> NDArray[np.float32]:
    return np.array([dialogue.dissatisfied for dialogue in dialogues], dtype=np.float32)


def _judge(net: Escalation, dialogues: Sequence[Dialogue]) -> NDArray[np.float64]:
    return np.array([net.dissatisfied(dialogue.messages) for dialogue in dialogues])


def _accuracy(p: NDArray[Any], dialogues: Sequence[Dialogue], threshold: float = 0.5) -> float:
    return float(np.mean((p >= threshold) == (_labels(dialogues) > 0)))
