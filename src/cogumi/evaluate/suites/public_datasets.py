"""Readers of public data sets of questions, in the format of their publishers, one folder per data set.

A source is one of a data set's files (or subjects), so that a router can be measured on files outside its training
data. A question that occurs in several sources of a data set is kept in the first.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from cogumi.core.errors import DataError

Sources = dict[str, list[str]]
"""Source -> questions."""

_HELD_BACK = "sanitized-mbpp.json"  # rewritten questions of mbpp.jsonl


def _lines(path: Path) -> Iterator[Any]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _whole(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _gsm8k(folder: Path) -> Sources:
    return {
        path.name: [row["question"] for row in _lines(path)] for path in (folder / "train.jsonl", folder / "test.jsonl")
    }


def _mbpp(folder: Path) -> Sources:
    clean = _whole(folder / _HELD_BACK)
    taken = {row["task_id"] for row in clean}
    rest = [row["text"] for row in _lines(folder / "mbpp.jsonl") if row["task_id"] not in taken]
    return {"mbpp.jsonl": rest, _HELD_BACK: [row["prompt"] for row in clean]}


def _mmlu(folder: Path) -> Sources:
    found: Sources = {}
    for path in sorted(folder.glob("*_test.csv")):
        with open(path, encoding="utf-8", newline="") as file:
            found[path.name] = [_with_options(i, row) for i, row in enumerate(csv.DictReader(file))]
    return found


def _with_options(index: int, row: dict[str, str]) -> str:
    """A question, every second one with its options, because users ask both ways."""
    options = "".join(f"\n{letter}. {row[f'choice{i}']}" for i, letter in enumerate("ABCD"))
    return row["question"] + (options if index % 2 else "")


def _bfcl(folder: Path) -> Sources:
    return {
        path.name: [row["question"][0][-1]["content"] for row in _lines(path)]
        for path in sorted(folder.glob("BFCL_*.json"))
    }


def _bbh(folder: Path) -> Sources:
    return {path.name: [row["input"] for row in _whole(path)["examples"]] for path in sorted(folder.glob("*.json"))}


def _truthfulqa(folder: Path) -> Sources:
    with open(folder / "TruthfulQA.csv", encoding="utf-8", newline="") as file:
        return {"TruthfulQA.csv": [row["Question"] for row in csv.DictReader(file)]}


def _dolly(folder: Path) -> Sources:
    return {"dolly_3k.json": [_instruction({"instances": [row], **row}) for row in _whole(folder / "dolly_3k.json")]}


def _instruction(row: dict[str, Any]) -> str:
    given = row["instances"][0]["input"]
    return f"{row['instruction']}\n{given}" if given else str(row["instruction"])


READERS: dict[str, Callable[[Path], Sources]] = {
    "gsm8k": _gsm8k,
    "mbpp": _mbpp,
    "mmlu": _mmlu,
    "bfcl": _bfcl,
    "strategyqa": lambda folder: {"dev.json": [row["question"] for row in _whole(folder / "dev.json")]},
    "truthfulqa": _truthfulqa,
    "ifeval": lambda folder: {"input_data.jsonl": [row["prompt"] for row in _lines(folder / "input_data.jsonl")]},
    "alpaca_seed": lambda folder: {"seed_tasks.jsonl": [_instruction(r) for r in _lines(folder / "seed_tasks.jsonl")]},
    "alpaca_subset": _dolly,
    "bbh": _bbh,
    "mt_bench": lambda folder: {"question.jsonl": [row["turns"][0] for row in _lines(folder / "question.jsonl")]},
    "selfaware": lambda folder: {
        "SelfAware.json": [
            row["question"] for row in _whole(folder / "SelfAware.json")["example"] if not row["answerable"]
        ]
    },
}
"""Data set (name of its folder) -> its reader."""


def read_dataset(data: Path, name: str) -> Sources:
    """The questions of one data set in `data`. Raises `DataError` if they are missing or in another format."""
    try:
        sources = READERS[name](data / name)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DataError(
            f"{data / name} is not {name} as published ({error!r}); name the folder of public data"
        ) from error
    seen: set[str] = set()
    found = {}
    for source, questions in sources.items():
        new = [q for q in dict.fromkeys(questions) if q.strip() and q not in seen]
        seen.update(new)
        found[source] = new
    if not seen:
        raise DataError(f"{data / name} holds no question; name the folder of public data")
    return found
