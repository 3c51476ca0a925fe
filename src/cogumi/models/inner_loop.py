"""The inner loop of meta-learning from few examples, shared by training and evaluation (SPEC C2).

ANIL (Raghu et al., 1909.09157) adapts the output head only, see `models.head_adaptation`; MAML (Finn et al.,
1703.03400) adapts more, here the weights of an adapter. Both are first-order: the gradient with respect to adapted
weights is used as the gradient of the initial ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from cogumi.core.errors import DataError
from cogumi.core.types import Example, Message
from cogumi.models.answer_match import language_model
from cogumi.models.head_adaptation import Rates, States
from cogumi.models.tokenization import HFTokenizer, Row

Weights = Mapping[str, Tensor]


def example_row(example: Example, tokenizer: HFTokenizer, context: int, before: Sequence[Example] = ()) -> Row:
    """The tokens of an example, with the examples `before` as earlier turns of the conversation.

    `DataError` if the row exceeds the model's context.
    """
    turns = [m for e in before for m in (*e.messages, Message("assistant", e.answer))]
    prompt = tokenizer.chat([*turns, *example.messages])
    ids = (*prompt, *tokenizer.answer(example.answer))
    if len(ids) > context:
        raise DataError(
            f"example {example.id} with {len(before)} examples before it has {len(ids)} tokens, the model's context "
            f"{context}; make the episodes of shorter questions or fewer examples"
        )
    return Row(ids, len(prompt))


def weights_of(model: Any) -> dict[str, Tensor]:
    """The adapter's weights on the layers, by name."""
    return {name: weight for name, weight in language_model(model).model.named_parameters() if "lora_" in name}


def states(model: Any, rows: Sequence[Row], weights: Weights | None = None) -> tuple[States, Tensor]:
    """The head's inputs for every answer token, and the row of each `[n]`; `weights` replaces weights of the layers."""
    lm = language_model(model)
    width = max(len(r.ids) for r in rows)
    ids = torch.tensor([r.ids + (0,) * (width - len(r.ids)) for r in rows], device=lm.lm_head.weight.device)
    row = torch.tensor([i for i, r in enumerate(rows) for _ in r.ids[r.start :]], device=ids.device)
    position = torch.tensor([i for r in rows for i in range(r.start, len(r.ids))], device=ids.device)
    inputs = {"input_ids": ids, "use_cache": False}
    output = functional_call(lm.model, dict(weights), (), inputs) if weights else lm.model(**inputs)
    hidden = output.last_hidden_state[row, position - 1]
    return States(hidden, lm.lm_head(hidden), ids[row, position]), row


def adapt_weights(model: Any, weights: Weights, support: Sequence[Row], rates: Rates) -> dict[str, Tensor]:
    """Weights of the layers after gradient descent on the mean nats of a support set; first-order towards `weights`."""
    fast = {name: weight.detach() for name, weight in weights.items()}
    with torch.enable_grad():
        for _ in range(rates.steps):
            leaves = {name: weight.requires_grad_() for name, weight in fast.items()}
            found, _ = states(model, support, leaves)
            gradients = torch.autograd.grad(cross_entropy(found.base, found.targets), list(leaves.values()))
            fast = {n: w.detach() - rates.lr * g for (n, w), g in zip(leaves.items(), gradients, strict=True)}
    return {name: value + (weights[name] - weights[name].detach()) for name, value in fast.items()}
