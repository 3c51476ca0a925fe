"""Stage `fewshot`: accuracy gained by a few examples on task families that no model was trained on (SPEC C2, C9).

ANIL is compared with four controls, measured on the same episodes:

zero_shot   the base, without examples
in_context  the base, with the examples as earlier turns of the conversation
scratch     the base and a new LoRA on its head, adapted to the examples: ANIL without meta-training
plain       a LoRA trained on the same episodes for as many steps without an inner loop; its head is adapted too

and with `fomaml`, if the recipe has one. The rates of `scratch` and `plain` are the best of a grid on the selection
families; `anil` and `fomaml` use those of their training. An answer is right if greedy decoding gives it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import ArtifactError
from cogumi.core.files import write_text
from cogumi.core.model_fingerprint import model_fingerprint
from cogumi.core.pictures import legend_below, new_figure
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example
from cogumi.data.episodes import Episode, read_episodes
from cogumi.models import head_adaptation as heads
from cogumi.models.answer_match import exact
from cogumi.models.folders import load
from cogumi.models.head_adaptation import Head, Rates, States
from cogumi.models.inner_loop import adapt_weights, example_row, states, weights_of
from cogumi.models.lora import with_adapter
from cogumi.models.tokenization import HFTokenizer, Row

VERSION = 1
KIND = "fewshot"
INPUTS = {"episodes": "episodes", "model": "model", "anil": "adapter", "plain": "adapter"}
OPTIONAL = {"fomaml": "adapter", "anil_*": "adapter", "plain_*": "adapter", "fomaml_*": "adapter"}

CONTROLS = ("zero_shot", "in_context", "scratch", "plain")

Doubles = NDArray[np.float64]
Accuracy = Callable[[Episode, int], float]
"""accuracy(episode, shots) -> share of its queries answered correctly."""


class Config(BaseModel):
    """`queries`: most questions per episode; `lrs` x `steps` is the grid for the controls' rates."""

    model_config = ConfigDict(extra="forbid")
    shots: tuple[int, ...] = Field((1, 3, 5), min_length=1)
    queries: int = Field(10, ge=1)
    lrs: tuple[float, ...] = Field((0.03, 0.1, 0.3), min_length=1)
    steps: tuple[int, ...] = Field((3, 10, 30), min_length=1)
    resamples: int = Field(2000, ge=100)


@dataclass(frozen=True, slots=True)
class EpisodeStates:
    """A head's inputs for an episode: support tokens with their example's number, query tokens with their row's."""

    support: States
    example: torch.Tensor
    query: States
    row: torch.Tensor


class Judge:
    """Measures models on episodes."""

    def __init__(self, model: Artifact, config: Config) -> None:
        base = self.base = model.path
        self.config = config
        self.tokenizer = HFTokenizer.load(base)
        self.plain = load(base).eval()
        self.room = self.plain.config.max_position_embeddings
        self.base_sha256 = model_fingerprint(model)

    def adapter(self, artifact: Artifact) -> Any:
        """The base with the adapter of an artifact; `ArtifactError` if that was trained on another base."""
        if artifact.metrics.get("base_sha256") != self.base_sha256:
            raise ArtifactError(f"{artifact.path} was trained on another base than {self.base}; train it on this one")
        return with_adapter(load(self.base), artifact.path).eval()

    @torch.no_grad()
    def in_context(self, episode: Episode, shots: int) -> float:
        """Accuracy of the base with the first `shots` examples as turns before each question."""
        before = episode.support[:shots]
        queries = [example_row(e, self.tokenizer, self.room, before) for e in episode.query[: self.config.queries]]
        found, row = states(self.plain, queries)
        return float(exact(found.base, found.targets, row, len(queries)).double().mean())

    def _rows(self, examples: Sequence[Example], count: int) -> list[Row]:
        return [example_row(e, self.tokenizer, self.room) for e in examples[:count]]

    @torch.no_grad()
    def episode_states(self, model: Any, episode: Episode) -> EpisodeStates:
        """The head's inputs for an episode under a model."""
        support, example = states(model, self._rows(episode.support, max(self.config.shots)))
        query, row = states(model, self._rows(episode.query, self.config.queries))
        return EpisodeStates(support, example, query, row)

    def head(
        self, model: Any, start: Head, rates: Rates | None, selection: Sequence[Episode]
    ) -> tuple[Accuracy, Rates]:
        """Accuracy of a head adapted to the first examples; without `rates`, those of the grid best on `selection`."""
        if rates is None:
            found = [self.episode_states(model, episode) for episode in selection]
            grid = [Rates(lr=lr, steps=steps) for lr in self.config.lrs for steps in self.config.steps]
            rates = max(grid, key=lambda r: sum(adapted(start, s, k, r) for s in found for k in self.config.shots))
        chosen, cached = rates, dict[str, EpisodeStates]()

        def accuracy(episode: Episode, shots: int) -> float:
            if episode.id not in cached:
                cached[episode.id] = self.episode_states(model, episode)
            return adapted(start, cached[episode.id], shots, chosen)

        return accuracy, rates

    def weights(self, model: Any, rates: Rates) -> Accuracy:
        """Accuracy of a model whose adapter weights are adapted to the first examples."""

        def accuracy(episode: Episode, shots: int) -> float:
            queries = self._rows(episode.query, self.config.queries)
            fast = adapt_weights(model, weights_of(model), self._rows(episode.support, shots), rates)
            with torch.no_grad():
                found, row = states(model, queries, fast)
            return float(exact(found.base, found.targets, row, len(queries)).double().mean())

        return accuracy


@torch.no_grad()
def adapted(start: Head, episode: EpisodeStates, shots: int, rates: Rates) -> float:
    """Share of queries answered correctly by the head after adaptation to the first `shots` examples."""
    head = heads.adapt(start, episode.support.select(episode.example < shots), rates)
    right = exact(heads.logits(head, episode.query), episode.query.targets, episode.row, int(episode.row.max()) + 1)
    return float(right.double().mean())


def measure(
    judge: Judge, inputs: Mapping[str, Artifact], episodes: Sequence[Episode], context: Context
) -> tuple[dict[str, list[Doubles]], dict[str, Rates]]:
    """For every method: the accuracy of each run `[shots, episodes]`, and the rates of the last."""
    selection = read_episodes(inputs["episodes"].path, "selection")
    found: dict[str, list[Doubles]] = {}
    used: dict[str, Rates] = {}
    roles = [role for role in sorted(inputs) if role.split("_")[0] in ("anil", "plain", "fomaml")]
    total = 2 + len(roles) + sum(role.startswith("anil") for role in roles)

    def record(method: str, accuracy: Accuracy, rates: Rates | None = None) -> None:
        runs = found.setdefault(method, [])
        runs.append(np.array([[accuracy(e, k) for e in episodes] for k in judge.config.shots]))
        used.update({method: rates} if rates else {})
        context.progress(sum(map(len, found.values())), total, {})

    record("zero_shot", lambda episode, _: judge.in_context(episode, 0))
    record("in_context", judge.in_context)
    for role in roles:
        method, artifact = role.split("_")[0], inputs[role]
        model = judge.adapter(artifact)
        if method == "fomaml":
            rates = Rates(**artifact.metrics["inner"])
            record(method, judge.weights(model, rates), rates)
            continue
        start, trained_rates, _ = heads.load(artifact.path / heads.FILE)
        record(method, *judge.head(model, start, trained_rates if method == "anil" else None, selection))
        if method == "anil":
            (rank, width), seed = start.a.shape, context.seed + len(found.get("scratch", ()))
            new = heads.initial_head(rank, start.scale * rank, width, len(start.b), seed)
            record("scratch", *judge.head(judge.plain, new, None, selection))
    return found, used


def gains(found: Mapping[str, Sequence[Doubles]], draws: Sequence[int], config: Config, seed: int) -> dict[str, Any]:
    """ANIL's accuracy minus the best control's, by shots, with a 95% bootstrap interval.

    A resample draws seeds of episodes, episodes of each seed, and runs of each method; each resample has its own best
    control.
    """
    groups = [np.flatnonzero(np.array(draws) == draw) for draw in sorted(set(draws))]
    runs = {method: np.stack(found[method]) for method in (*CONTROLS, "anil")}
    rng = np.random.default_rng(seed)

    def gain(means: Mapping[str, Doubles]) -> Doubles:
        best: Doubles = np.max([means[method] for method in CONTROLS], axis=0)
        return means["anil"] - best

    drawn = []
    for _ in range(config.resamples):
        chosen = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        episodes = np.concatenate([rng.choice(group, len(group)) for group in chosen])
        some = {m: r[rng.integers(len(r), size=len(r))] for m, r in runs.items()}
        drawn.append(gain({method: r[:, :, episodes].mean((0, 2)) for method, r in some.items()}))
    low, high = np.quantile(drawn, (0.025, 0.975), axis=0)
    means = {method: r.mean((0, 2)) for method, r in runs.items()}
    return {
        str(k): {
            "gain": round(float(gain(means)[i]), 4),
            "low": round(float(low[i]), 4),
            "high": round(float(high[i]), 4),
            "over": max(CONTROLS, key=lambda method: means[method][i]),
        }
        for i, k in enumerate(config.shots)
    }


def picture(path: Path, accuracy: Mapping[str, Mapping[str, float]]) -> None:
    """Accuracy against shots, a line for each method."""
    figure, axes = new_figure(1)
    for method, by_shots in accuracy.items():
        axes[0].plot([int(k) for k in by_shots], list(by_shots.values()), marker="o", label=method)
    axes[0].set(xlabel="examples given", ylabel="share right, unseen families", ylim=(0, 1))
    legend_below(axes[0], columns=3)
    figure.savefig(path)


def report(metrics: Mapping[str, Any], episodes: int, config: Config) -> str:
    """The figures as Markdown."""
    shots = [str(k) for k in config.shots]
    middle = str(sorted(config.shots)[len(shots) // 2])
    families = sorted(metrics["by_family"]["anil"][middle])
    lines = [
        "# Few-shot learning on unseen task families",
        "",
        f"{episodes} episodes, {metrics['draws']} seeds, up to {config.queries} questions each, exact answers.",
        "",
        f"| method | {' | '.join(f'{k}-shot' for k in shots)} | rates |",
        f"|---|{'---|' * (len(shots) + 1)}",
    ]
    for method, by_shots in metrics["accuracy"].items():
        rates = metrics["rates"].get(method)
        how = f"{rates['steps']} x {rates['lr']:g}" if rates else ""
        lines.append(f"| {method} | {' | '.join(f'{by_shots[k]:.1%}' for k in shots)} | {how} |")
    lines += ["", "ANIL against the best of the four controls, 95% interval:", ""]
    for k, g in metrics["gain"].items():
        lines.append(f"- {k}-shot: {g['gain']:+.1%} ({g['low']:+.1%} to {g['high']:+.1%}) over {g['over']}")
    lines += [
        "",
        f"By family, {middle}-shot:",
        "",
        f"| method | {' | '.join(families)} |",
        f"|---|{'---|' * len(families)}",
    ]
    for method, cells in metrics["by_family"].items():
        lines.append(f"| {method} | {' | '.join(f'{cells[middle][f]:.1%}' for f in families)} |")
    lines += [
        "",
        "`scratch` is a new LoRA on the head of the base, adapted to the examples without meta-training; `plain` was",
        "trained on the same episodes for as many steps without an inner loop. Their rates were chosen on the",
        "selection families. One example does not determine a renaming of two or three classes, which limits 1-shot",
        "accuracy.",
    ]
    return "\n".join(lines) + "\n"


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`episodes`, `model` (the base), `anil` and `plain`, optionally `fomaml` -> report.md and shots.png.

    Further runs of a method with other seeds are inputs `anil_2` and so on.
    """
    torch.set_num_threads(context.threads)
    episodes = read_episodes(inputs["episodes"].path, "heldout")
    found, rates = measure(Judge(inputs["model"], config), inputs, episodes, context)
    mean = {method: np.mean(runs, axis=0) for method, runs in found.items()}
    families = sorted({episode.family for episode in episodes})
    of = np.array([episode.family for episode in episodes])
    shots = [str(k) for k in config.shots]
    metrics: dict[str, Any] = {
        "accuracy": {m: dict(zip(shots, map(_share, cells), strict=True)) for m, cells in mean.items()},
        "by_family": {
            m: {k: {f: _share(row[of == f]) for f in families} for k, row in zip(shots, cells, strict=True)}
            for m, cells in mean.items()
        },
        "gain": gains(found, [episode.draw for episode in episodes], config, context.seed),
        "rates": {method: chosen.model_dump() for method, chosen in rates.items()},
        "runs": {method: len(runs) for method, runs in found.items()},
        "draws": len({episode.draw for episode in episodes}),
    }
    write_text(out / "report.md", report(metrics, len(episodes), config))
    picture(out / "shots.png", metrics["accuracy"])
    return metrics


def _share(values: Doubles) -> float:
    return round(float(values.mean()), 4)
