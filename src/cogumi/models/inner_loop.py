"""The inner loop of few-shot learning, shared by its training and its measurement (SPEC C2).

ANIL (Raghu et al., 1909.09157) adapts the head only, see `models.head_adaptation`; MAML (Finn et al., 1703.03400)
adapts more, here the weights of an adapter. Both are first-order: adapted weights pass gradients on to the initial ones
unchanged.
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


def shot(example: Example, tokenizer: HFTokenizer, context: int, before: Sequence[Example] = ()) -> Row:
    """An example as tokens, after other examples as turns of the same conversation.

    `DataError` if that is longer than the model's context.
    """
    told = [m for e in before for m in (*e.messages, Message("assistant", e.answer))]
    prompt = tokenizer.chat([*told, *example.messages])
    ids = (*prompt, *tokenizer.answer(example.answer))
    if len(ids) > context:
        raise DataError(
            f"example {example.id} with {len(before)} examples before it has {len(ids)} tokens, the model's context "
            f"{context}; make the episodes of shorter questions or fewer examples"
        )
    return Row(ids, len(prompt))


def weights_of(model: Any) -> dict[str, Tensor]:
    """The weights of the adapter on the layers, by name."""
    return {name: weight for name, weight in language_model(model).model.named_parameters() if "lora_" in name}


def states(model: Any, shots: Sequence[Row], weights: Weights | None = None) -> tuple[States, Tensor]:
    """What the head sees of every answer token, and whose it is `[n]`; with other `weights` of the layers if given."""
    lm = language_model(model)
    width = max(len(s.ids) for s in shots)
    ids = torch.tensor([s.ids + (0,) * (width - len(s.ids)) for s in shots], device=lm.lm_head.weight.device)
    row = torch.tensor([r for r, s in enumerate(shots) for _ in s.ids[s.start :]], device=ids.device)
    place = torch.tensor([i for s in shots for i in range(s.start, len(s.ids))], device=ids.device)
    inputs = {"input_ids": ids, "use_cache": False}
    output = functional_call(lm.model, dict(weights), (), inputs) if weights else lm.model(**inputs)
    hidden = output.last_hidden_state[row, place - 1]
    return States(hidden, lm.lm_head(hidden), ids[row, place]), row


def adapt_weights(model: Any, weights: Weights, support: Sequence[Row], rates: Rates) -> dict[str, Tensor]:
    """Weights of the layers after gradient descent on the mean nats of a support set; first-order towards `weights`."""
    fast = {name: weight.detach() for name, weight in weights.items()}
    with torch.enable_grad():
        for _ in range(rates.steps):
            leaves = {name: weight.requires_grad_() for name, weight in fast.items()}
            seen, _ = states(model, support, leaves)
            slopes = torch.autograd.grad(cross_entropy(seen.base, seen.targets), list(leaves.values()))
            fast = {n: w.detach() - rates.lr * slope for (n, w), slope in zip(leaves.items(), slopes, strict=True)}
    return {name: value + (weights[name] - weights[name].detach()) for name, value in fast.items()}
