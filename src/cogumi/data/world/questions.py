"""Stage `world`: five disjoint sets of generated questions for training, selection, calibration and evaluation."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.estimate import Estimate, Given
from cogumi.core.facts import RowFacts
from cogumi.core.stage import Context
from cogumi.core.types import Artifact, Example, Message
from cogumi.data.examples import SPLITS, example_id, normalised_question, split_of, split_path, write_examples
from cogumi.data.world import DIFFICULTIES, DOMAINS, SYNTHETIC, UNANSWERABLE, make
from cogumi.data.world.task import Maker, Task, Wording

VERSION = 4
KIND = "examples"
LIGHT = True
INPUTS: dict[str, str] = {}

UNANSWERABLE_FILE = "unanswerable.jsonl"
"""Held-out unanswerable questions, including the unseen kinds."""

# A question's split is a hash of its text, so that two sets never share one.
_SHARES = {"train": 60, "selection": 5, "fit": 12, "threshold": 12, "heldout": 11}
_TRIES = 2_000
DRAWN = 30
"""Questions drawn of each cell for the estimate of row lengths."""
NATURAL_SYSTEM = "Answer in one short sentence. If you cannot know the answer, say: I don't know."
"""The system prompt of natural questions, unless the config gives another."""
UNANSWERABLE_FACTOR = 3
"""Bounding the share of confidently answered unanswerable questions needs some hundreds of them."""


class Config(BaseModel):
    """Questions per cell (a domain at one difficulty) in each set. Each seen kind of unanswerable questions is one more
    cell, with `UNANSWERABLE_FACTOR` times as many questions in all sets but training.

    Training gets fewer questions if a cell is exhausted. Kinds in `unseen` occur only in the held-out file
    `unanswerable.jsonl`, which holds `unanswerable` questions of each kind; kinds of other domains are ignored.

    `wording` natural asks as a person asks a pretrained model, and puts the prompt `system` before every question
    (None: a short one if natural, none if terse; an empty one is left out).
    """

    model_config = ConfigDict(extra="forbid")
    train: int = Field(800, ge=1)
    train_by_domain: dict[str, int] = Field(default_factory=dict, description="instead of `train`, where named")
    selection: int = Field(20, ge=1)
    fit: int = Field(70, ge=1)
    threshold: int = Field(70, ge=1)
    heldout: int = Field(70, ge=1)
    unanswerable: int = Field(200, ge=1)
    unseen: tuple[str, ...] = ("invented_thing", "invented_city")
    domains: tuple[str, ...] = Field(SYNTHETIC, min_length=1)
    wording: Wording = "terse"
    system: str | None = None

    def system_messages(self) -> tuple[Message, ...]:
        """The system message of every question, if there is one."""
        system = self.system if self.system is not None else NATURAL_SYSTEM if self.wording == "natural" else ""
        return (Message("system", system),) if system else ()

    def trained(self, domain: str) -> int:
        """Training questions in each cell of a domain."""
        return self.train_by_domain.get(domain, self.train)

    def kinds(self) -> dict[str, tuple[str, Maker]]:
        """Kinds of unanswerable questions of these domains."""
        return {kind: made for kind, made in UNANSWERABLE.items() if made[0] in self.domains}


def _example(task: Task, domain: str, difficulty: int, kind: str | None, system: tuple[Message, ...] = ()) -> Example:
    messages = (*system, *task.messages)
    meta: dict[str, Any] = {"check": dict(task.check)}
    if task.group:
        meta |= {"group": task.group, "key": task.key}
    if kind:
        meta["unanswerable"] = kind
    return Example(example_id(domain, messages), domain, difficulty, messages, task.answer, "world", meta)


def draw(
    cell: str, counts: Mapping[str, int], make_task: Callable[[random.Random], Task], seed: int
) -> dict[str, list[Task]]:
    """Distinct questions of one cell for every set; `DataError` if the cell has too few."""
    rng = random.Random(f"{seed}/{cell}")
    drawn: dict[str, list[Task]] = {name: [] for name in counts}
    seen: set[str] = set()
    missing, tries = sum(counts.values()), 0
    while missing:
        task = make_task(rng)
        question = normalised_question(task.messages)
        name = split_of(task.key or question, _SHARES, seed)
        tries += 1
        if question not in seen and len(drawn[name]) < counts[name]:
            seen.add(question)
            drawn[name].append(task)
            missing, tries = missing - 1, 0
        elif tries > _TRIES and all(len(drawn[n]) == counts[n] for n in counts if n != "train"):
            break
        elif tries > _TRIES:
            short = {n: counts[n] - len(drawn[n]) for n in counts if len(drawn[n]) < counts[n]}
            raise DataError(
                f"the world has too few different questions in {cell}: {short} are missing; lower the count"
            )
    return drawn


def made_with(metrics: Mapping[str, Any]) -> Config:
    """The config that matters to `draw_fresh`, from the metrics of this stage."""
    known = {name: metrics[name] for name in ("domains", "wording", "system") if name in metrics}
    return Config(**known)


def draw_fresh(
    per_cell: int,
    seed: int,
    progress: Callable[[int, int, Mapping[str, float]], None],
    split: str = "heldout",
    config: Config | None = None,
) -> list[Example]:
    """Up to `per_cell` distinct questions of each cell, including unanswerable kinds, that `seed` assigns to a split.

    `config` (None: `Config()`) chooses domains and wording. The `source` of each example is the name of its cell.
    """
    config = config or Config()
    system = config.system_messages()
    makers: dict[str, tuple[str, int, str | None, Maker]] = {
        kind: (domain, 0, kind, make_task) for kind, (domain, make_task) in config.kinds().items()
    }
    makers |= {
        f"{domain}/{k}": (domain, k, None, partial(make, domain, k)) for domain in config.domains for k in DIFFICULTIES
    }
    found: list[Example] = []
    for done, (cell, (domain, difficulty, kind, make_task)) in enumerate(makers.items()):
        rng = random.Random(f"{seed}/fresh/{cell}")
        seen: set[str] = set()
        tries = 0
        while len(seen) < per_cell and tries < _TRIES:
            task = make_task(rng, config.wording)
            question = normalised_question(task.messages)
            tries += 1
            if question not in seen and split_of(task.key or question, _SHARES, seed) == split:
                seen.add(question)
                found.append(replace(_example(task, domain, difficulty, kind, system), source=cell))
                tries = 0
        progress(done + 1, len(makers), {})
    return found


def estimate(config: Config, given: Given) -> Estimate:
    """Row lengths estimated from some questions of each cell; the number of rows is an upper bound."""
    rng, pairs, count = random.Random(0), [], 0
    system = sum(len(message.content.encode()) for message in config.system_messages())
    for domain in config.domains:
        for difficulty in DIFFICULTIES:
            tasks = [make(domain, difficulty, rng, config.wording) for _ in range(DRAWN)]
            pairs += [(system + len(task.question.encode()), len(task.answer.encode())) for task in tasks]
            count += config.trained(domain)
    return Estimate((RowFacts.of(pairs, count),))


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """No inputs -> `<split>.jsonl` for every set, and `unanswerable.jsonl`."""
    unknown = sorted(set(config.unseen) - set(UNANSWERABLE))
    if unknown:
        raise DataError(f"unknown kinds {unknown} in `unseen`; choose from {sorted(UNANSWERABLE)}")
    counts = {name: int(getattr(config, name)) for name in SPLITS}
    sets: dict[str, list[Example]] = {name: [] for name in SPLITS}
    unknown = sorted(set(config.domains) - set(DOMAINS))
    if unknown:
        raise DataError(f"unknown domains {unknown} in `domains`; choose from {sorted(DOMAINS)}")
    unknown = sorted(set(config.train_by_domain) - set(config.domains))
    if unknown:
        raise DataError(f"unknown domains {unknown} in `train_by_domain`; choose from {sorted(config.domains)}")
    kinds, system = config.kinds(), config.system_messages()
    cells = [(domain, difficulty) for domain in config.domains for difficulty in DIFFICULTIES]
    for done, (domain, difficulty) in enumerate(cells):
        tasks = draw(
            f"{domain}/{difficulty}",
            counts | {"train": config.trained(domain)},
            partial(make, domain, difficulty, wording=config.wording),
            context.seed,
        )
        for name in SPLITS:
            sets[name] += [_example(task, domain, difficulty, None, system) for task in tasks[name]]
        context.progress(done + 1, len(cells) + len(kinds), {})
    unanswerable: list[Example] = []
    for done, (kind, (domain, make_task)) in enumerate(kinds.items()):
        unseen = kind in config.unseen
        per_set = {name: UNANSWERABLE_FACTOR * n for name, n in counts.items()} | {"train": config.trained(domain)}
        wanted = dict.fromkeys(SPLITS, 0) if unseen else per_set
        wanted["heldout"] += config.unanswerable
        tasks = draw(kind, wanted, partial(make_task, wording=config.wording), context.seed)
        unanswerable += [_example(t, domain, 0, kind, system) for t in tasks["heldout"][: config.unanswerable]]
        tasks["heldout"] = tasks["heldout"][config.unanswerable :]
        for name in SPLITS:
            sets[name] += [_example(task, domain, 0, kind, system) for task in tasks[name]]
        context.progress(len(cells) + done + 1, len(cells) + len(kinds), {})
    for name in SPLITS:
        random.Random(f"{context.seed}/{name}").shuffle(sets[name])
        write_examples(split_path(out, name), sets[name])
    write_examples(out / UNANSWERABLE_FILE, unanswerable)
    return {
        "rows": {**{name: len(rows) for name, rows in sets.items()}, "unanswerable": len(unanswerable)},
        "domains": list(config.domains),
        "unanswerable_kinds": sorted(kinds),
        "unseen_kinds": [kind for kind in config.unseen if kind in kinds],
        "wording": config.wording,
        "system": "\n".join(message.content for message in config.system_messages()),
    }
