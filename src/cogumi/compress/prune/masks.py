"""Weights of a model set to zero, and held there while it trains (SPEC D2).

Wanda and SparseGPT (Frantar and Alistarh, 2301.00774) are llm-compressor's. Magnitude is not: its modifier follows the
events of a training session and cannot prune at once; nor can it, or the two others, prune embeddings. Both are done
here, by the importance of `sparsity`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from cogumi.compress.gguf.importance import measure
from cogumi.compress.gguf.layout import Llama
from cogumi.compress.prune.sparsity import GROUP, Mix, importance, least, least_of_four, part_of
from cogumi.core.errors import RecipeError
from cogumi.core.stage import Context
from cogumi.models.tokenization import Row
from cogumi.train.batches import collate
from cogumi.train.losses import answer_loss
from cogumi.train.validation import passes

Method: TypeAlias = Literal["magnitude", "wanda", "sparsegpt"]
Structure: TypeAlias = Literal["unstructured", "2:4"]
Chosen: TypeAlias = Mapping[str, tuple[Tensor, float]]
"""By name a weight, and the share of it to prune."""


@dataclass(frozen=True, slots=True)
class Pruner:
    """How weights are chosen. `mix` is for what the method itself does not do: all of `magnitude`, and embeddings."""

    method: Method
    structure: Structure
    mix: Mix

    def prune(
        self, model: Any, llama: Llama, shares: Mapping[str, float], rows: Sequence[Row], context: Context
    ) -> None:
        """Set `shares` of the parts' weights to zero, in place; `rows` are what a method looks at.

        A part that is sparse enough is left alone. What is zero counts, and stays; but SparseGPT chooses a 2:4 pattern
        anew, because llm-compressor 0.14 reads a former mask of 2:4 at the wrong columns.
        """
        found = {
            name: (weight, shares[part])
            for part, names in matrices(model).items()
            for name, weight in names.items()
            if part in shares and not self._done(weight, shares[part])
        }
        linear = {} if self.method == "magnitude" else {n: found[n] for n in found if n.endswith("_proj.weight")}
        own = {name: found[name] for name in found if name not in linear}
        if own:
            self._prune_by_mix(model, llama, own, rows, context)
        if linear:
            self._prune_by_calibration(model, linear, rows, context)

    def _done(self, weight: Tensor, share: float) -> bool:
        """Whether a weight is sparse enough as it is."""
        zero = weight == 0
        if self.structure == "unstructured":
            return float(zero.double().mean()) >= share
        return bool((zero.reshape(-1, GROUP).sum(1) >= round(GROUP * share)).all())

    def _prune_by_mix(self, model: Any, llama: Llama, chosen: Chosen, rows: Sequence[Row], context: Context) -> None:
        steep = gradients(model, rows, context) if self.mix.gradient else {}
        columns = activations(model, llama, rows, context) if self.mix.activation else {}
        with torch.no_grad():
            for name, (weight, share) in chosen.items():
                scores = importance(weight, self.mix, steep.get(name), columns.get(name))
                weight[self._mask(scores, share)] = 0.0

    def _mask(self, scores: Tensor, share: float) -> Tensor:
        return least(scores, share) if self.structure == "unstructured" else least_of_four(scores, round(GROUP * share))

    def _prune_by_calibration(self, model: Any, chosen: Chosen, rows: Sequence[Row], context: Context) -> None:
        from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

        from cogumi.compress.oneshot import calibrated

        modifiers = []
        for share in sorted({share for _, share in chosen.values()}):
            pattern = "0:0" if self.structure == "unstructured" else f"{round(GROUP * share)}:{GROUP}"
            names = [name.removesuffix(".weight") for name in chosen if chosen[name][1] == share]
            options = {"sparsity": share, "mask_structure": pattern, "targets": names}
            modifiers.append(
                WandaPruningModifier(**options)
                if self.method == "wanda"
                else SparseGPTModifier(**options, preserve_sparsity_mask=self.structure == "unstructured")
            )
        calibrated(model, modifiers, rows, context)


def matrices(model: nn.Module) -> dict[str, dict[str, nn.Parameter]]:
    """The weights that may be pruned, by part and name."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if part := part_of(name):
            found.setdefault(part, {})[name] = weight
    return found


def weights(names: Mapping[str, Tensor]) -> int:
    """How many there are."""
    return sum(weight.numel() for weight in names.values())


def zeros(names: Mapping[str, Tensor]) -> int:
    """How many are exactly 0."""
    return sum(int((weight == 0).sum()) for weight in names.values())


def reached(model: nn.Module) -> dict[str, float]:
    """Share of weights that are exactly 0, by part."""
    return {part: zeros(names) / weights(names) for part, names in matrices(model).items()}


def gradients(model: Any, rows: Sequence[Row], context: Context) -> dict[str, Tensor]:
    """Mean absolute gradient of the answer loss, by weight; over batches of rows."""
    model.eval()
    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    every = list(passes(rows))
    for done, index in enumerate(every):
        model.zero_grad()
        loss, _ = answer_loss(model, collate(rows, index).to(next(model.parameters()).device))
        loss.backward()  # type: ignore[no-untyped-call]
        for name, weight in model.named_parameters():
            sums[name] += weight.grad.abs() / len(every)
        context.progress(done + 1, len(every), {})
    model.zero_grad()
    return sums


def activations(model: Any, llama: Llama, rows: Sequence[Row], context: Context) -> dict[str, Tensor]:
    """Root mean square of what each column of a linear layer's weight is multiplied with, by weight."""
    squares = measure(model, llama, rows, context.progress)
    device = next(model.parameters()).device
    return {t.source: squares[t.name].sqrt().to(device) for t in llama.tensors() if t.name in squares}


@contextmanager
def held(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Weights that are 0 stay 0 while the model trains; the function given is to be called after every step.

    No gradient reaches them, so that they count in no norm and no momentum. An optimizer that mixes the entries of a
    matrix (Muon) moves them all the same: what it moved is set back.
    """
    dead = [(weight, weight == 0) for names in matrices(model).values() for weight in names.values()]
    hooks = [weight.register_hook(_without(zero)) for weight, zero in dead]  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def after_step() -> None:
        for weight, zero in dead:
            weight[zero.to(weight.device)] = 0.0

    try:
        yield after_step
    finally:
        for hook in hooks:
            hook.remove()


def _without(zero: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(zero.to(gradient.device), 0.0)


def check(model: nn.Module, parts: Mapping[str, float], structure: Structure) -> None:
    """`RecipeError` for what this model cannot be pruned by."""
    found = matrices(model)
    for part in parts:
        if part not in found:
            raise RecipeError(
                f"this model has no part '{part}' (its head is its embedding); it has {', '.join(sorted(found))}"
            )
        for name, weight in found[part].items():
            if structure == "2:4" and weight.shape[1] % GROUP:
                raise RecipeError(
                    f"structure 2:4 needs rows of a multiple of {GROUP} weights, and {name} has {weight.shape[1]}; "
                    "use structure: unstructured, or leave that part out"
                )
