"""Stage `episodes`: few-shot tasks of the synthetic world (SPEC A12), as a support set and a query set each.

An artifact of kind `episodes` holds `train.jsonl`, `selection.jsonl` and `heldout.jsonl`, one episode per line. The
three sets share no task family and no substitute word, and no question with another set of the world. The support
cycles through the classes, so that its first k examples cover as many classes as possible.
"""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cogumi.core.errors import DataError
from cogumi.core.files import write_text
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import (
    SPLITS,
    example_id,
    from_json,
    iterate_examples,
    normalised_question,
    split_path,
    to_json,
)
from cogumi.data.task_families import FAMILIES, WORDS, Family

VERSION = 1
KIND = "episodes"
INPUTS = {"examples": "examples"}

_TRIES = 2_000

Range = tuple[int, int]


class Config(BaseModel):
    """Number of episodes per set, and the range (from, to) of examples in their support and query sets.

    The held-out set has `heldout` episodes for each of `seeds` draws. Selection and held-out episodes have the largest
    support, so that every number of shots can be evaluated on the same episodes.
    """

    model_config = ConfigDict(extra="forbid")
    train: int = Field(1200, ge=1)
    selection: int = Field(60, ge=1)
    heldout: int = Field(40, ge=1)
    seeds: int = Field(5, ge=1)
    support: Range = (3, 10)
    query: Range = (10, 20)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for name in ("support", "query"):
            low, high = getattr(self, name)
            if not 1 <= low <= high:
                raise ValueError(f"{name}: {low} to {high} is not a valid range; give two rising numbers, 1 or more")
        return self


@dataclass(frozen=True, slots=True)
class Episode:
    """A task: `support` reveals its `secret`, `query` tests it. `draw` numbers the seeds of the held-out set."""

    id: str
    family: str
    rule: str
    secret: str
    draw: int
    support: tuple[Example, ...]
    query: tuple[Example, ...]


def episode_path(artifact: Path, split: str) -> Path:
    """The file of one set inside an `episodes` artifact."""
    if split not in FAMILIES:
        raise DataError(f"unknown set of episodes '{split}'; use one of {', '.join(FAMILIES)}")
    return artifact / f"{split}.jsonl"


def read_episodes(artifact: Path, split: str) -> list[Episode]:
    """All episodes of a set; `DataError` for an unreadable or empty file, or an empty support or query set."""
    path = episode_path(artifact, split)
    try:
        lines = list(filter(None, path.read_text(encoding="utf-8").split("\n")))
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: build the `episodes` step first") from error
    episodes = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            sides = {side: tuple(from_json(example) for example in row[side]) for side in ("support", "query")}
            episodes.append(Episode(**{**row, **sides}))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number} is not an episode ({error}): build this step again") from error
        if empty := [side for side, examples in sides.items() if not examples]:
            raise DataError(
                f"{path}:{number}: the {empty[0]} set of episode {episodes[-1].id} is empty: give it examples"
            )
    if not episodes:
        raise DataError(f"{path} is empty; raise the number of episodes in the `episodes` step")
    return episodes


def write_episodes(artifact: Path, split: str, episodes: Iterable[Episode]) -> None:
    """Write a set, atomically."""
    rows = (
        {
            **{name: getattr(e, name) for name in ("id", "family", "rule", "secret", "draw")},
            "support": [to_json(example) for example in e.support],
            "query": [to_json(example) for example in e.query],
        }
        for e in episodes
    )
    write_text(episode_path(artifact, split), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def draw_episode(
    name: str,
    family: Family,
    words: Sequence[str],
    sizes: tuple[int, int],
    taken: Collection[str],
    key: str,
    draw: int = 0,
) -> Episode:
    """An episode of a family with `sizes` = (support, query) different questions, none of them in `taken`.

    The same `key` gives the same episode. `DataError` if the family has too few questions.
    """
    rng = random.Random(key)
    secret, classes, ask = family.begin(rng, words)
    seen: set[str] = set()

    def example(of: str) -> Example:
        for _ in range(_TRIES):
            task = ask(rng, of)
            messages = (Message("user", task.question),)
            question = normalised_question(messages)
            if question not in seen and question not in taken:
                seen.add(question)
                meta = {"check": dict(task.check)}
                return Example(example_id(family.domain, messages), family.domain, 0, messages, task.answer, name, meta)
        raise DataError(
            f"family '{name}' has too few different questions for an episode of {sum(sizes)}; reduce its size"
        )

    turns: list[str] = []
    while len(turns) < sizes[0]:
        turns += rng.sample(classes, len(classes))
    support = tuple(example(of) for of in turns[: sizes[0]])
    query = tuple(example(rng.choice(classes)) for _ in range(sizes[1]))
    return Episode(key, name, family.rule, secret, draw, support, query)


def draw_set(split: str, count: int, config: Config, seed: int, taken: Collection[str], draw: int = 0) -> list[Episode]:
    """`count` episodes, cycling through the families of the set."""
    families = list(FAMILIES[split].items())
    rng = random.Random(f"{seed}/{split}/{draw}")
    episodes = []
    for i in range(count):
        name, family = families[i % len(families)]
        support = rng.randint(*config.support) if split == "train" else config.support[1]
        sizes = support, rng.randint(*config.query)
        key = f"{seed}/{split}/{draw}/{i}"
        episodes.append(draw_episode(name, family, WORDS[split], sizes, taken, key, draw))
    return episodes


def questions(examples: Path, but: str) -> set[str]:
    """The normalised questions of all sets of an `examples` artifact but one."""
    paths = [split_path(examples, name) for name in SPLITS if name != but]
    return {normalised_question(example.messages) for path in paths for example in iterate_examples(path)}


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`examples` (a set of episodes must not repeat questions of its other sets) -> three sets of episodes."""
    metrics: dict[str, Any] = {"episodes": {}, "families": {}}
    for done, split in enumerate(FAMILIES, 1):
        taken = questions(inputs["examples"].path, split)
        draws = config.seeds if split == "heldout" else 1
        episodes = [
            episode
            for draw in range(draws)
            for episode in draw_set(split, getattr(config, split), config, context.seed, taken, draw)
        ]
        write_episodes(out, split, episodes)
        metrics["episodes"][split] = len(episodes)
        metrics["families"][split] = list(FAMILIES[split])
        context.progress(done, len(FAMILIES), {})
    return metrics
