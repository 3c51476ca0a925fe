"""Set weights of a model to zero, and keep them at zero during training (SPEC D2).

llm-compressor implements Wanda and SparseGPT (Frantar and Alistarh, 2301.00774). Its modifier for magnitude pruning
needs the events of a training session and cannot prune in one shot, and no method of it prunes embeddings. Both are
implemented here, with the importance of `sparsity`.
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
"""Name -> weight and the share of it to prune."""


@dataclass(frozen=True, slots=True)
class Pruner:
    """Pruning method. `mix` is the importance used by `magnitude`, and for embeddings by every method."""

    method: Method
    structure: Structure
    mix: Mix

    def prune(
        self, model: Any, llama: Llama, shares: Mapping[str, float], rows: Sequence[Row], context: Context
    ) -> None:
        """Set `shares` of the weights of each part to zero, in place; `rows` are calibration data.

        A weight that is sparse enough is not changed. Zeros count towards the share and stay zero, except that
        SparseGPT chooses a new 2:4 pattern, because llm-compressor 0.14 applies an existing 2:4 mask to wrong columns.
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
        """Whether a weight already has the requested sparsity."""
        zero = weight == 0
        if self.structure == "unstructured":
            return float(zero.double().mean()) >= share
        return bool((zero.reshape(-1, GROUP).sum(1) >= round(GROUP * share)).all())

    def _prune_by_mix(self, model: Any, llama: Llama, chosen: Chosen, rows: Sequence[Row], context: Context) -> None:
        gradient = gradients(model, rows, context) if self.mix.gradient else {}
        columns = activations(model, llama, rows, context) if self.mix.activation else {}
        with torch.no_grad():
            for name, (weight, share) in chosen.items():
                scores = importance(weight, self.mix, gradient.get(name), columns.get(name))
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
    """The weights that can be pruned, by part and name."""
    found: dict[str, dict[str, nn.Parameter]] = {}
    for name, weight in model.named_parameters():
        if part := part_of(name):
            found.setdefault(part, {})[name] = weight
    return found


def weights(names: Mapping[str, Tensor]) -> int:
    """Number of weights."""
    return sum(weight.numel() for weight in names.values())


def zeros(names: Mapping[str, Tensor]) -> int:
    """Number of weights that are exactly 0."""
    return sum(int((weight == 0).sum()) for weight in names.values())


def reached(model: nn.Module) -> dict[str, float]:
    """Share of weights that are exactly 0, by part."""
    return {part: zeros(names) / weights(names) for part, names in matrices(model).items()}


def gradients(model: Any, rows: Sequence[Row], context: Context) -> dict[str, Tensor]:
    """Mean over batches of rows of the absolute gradient of the answer loss, by weight name."""
    model.eval()
    sums = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    batches = list(passes(rows))
    for done, index in enumerate(batches):
        model.zero_grad()
        loss, _ = answer_loss(model, collate(rows, index).to(next(model.parameters()).device))
        loss.backward()  # type: ignore[no-untyped-call]
        for name, weight in model.named_parameters():
            sums[name] += weight.grad.abs() / len(batches)
        context.progress(done + 1, len(batches), {})
    model.zero_grad()
    return sums


def activations(model: Any, llama: Llama, rows: Sequence[Row], context: Context) -> dict[str, Tensor]:
    """Root mean square `[in]` of the inputs of each linear layer, by weight name."""
    squares = measure(model, llama, rows, context.progress)
    device = next(model.parameters()).device
    return {t.source: squares[t.name].sqrt().to(device) for t in llama.tensors() if t.name in squares}


@contextmanager
def held(model: nn.Module) -> Iterator[Callable[[], None]]:
    """Keep weights that are 0 at 0 during training; the yielded function must be called after every step.

    Their gradients are set to zero, so that they do not count in norms and momentum. An optimizer that mixes the
    entries of a matrix (Muon) still changes them, so they are reset after each step.
    """
    pruned = [(weight, weight == 0) for names in matrices(model).values() for weight in names.values()]
    hooks = [weight.register_hook(_without(zero)) for weight, zero in pruned]  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def after_step() -> None:
        for weight, zero in pruned:
            weight[zero.to(weight.device)] = 0.0

    try:
        yield after_step
    finally:
        for hook in hooks:
            hook.remove()


def _without(zero: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient.masked_fill(zero.to(gradient.device), 0.0)


def check(model: nn.Module, parts: Mapping[str, float], structure: Structure) -> None:
    """`RecipeError` for a part that the model lacks, and for 2:4 on rows that are not a multiple of 4."""
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
