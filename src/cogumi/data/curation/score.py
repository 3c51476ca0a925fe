"""Stage `score`: what the rules of stage `filter` need to know about each row (SPEC A5).

Scoring takes long if a model reads every answer; deciding takes seconds. So `filter` can be built again with other
thresholds, and this step stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import RequestError
from cogumi.core.estimate import Estimate, Given, uncounted
from cogumi.core.files import write_text
from cogumi.core.stage import CHECKPOINT, Context
from cogumi.core.types import Artifact, Example, Request
from cogumi.data.curation import boilerplate, copyright, length, offensive, personal_data
from cogumi.data.curation.pool_writer import examples_of, rows_of, whole_text
from cogumi.engine.llama.engine import LlamaEngine

VERSION = 2
KIND = "statistics"
INPUTS = {"pool": "pool"}
OPTIONAL = {"reference": "gguf"}
STATISTICS = "statistics.jsonl"
CHUNK = 200
"""Rows that are scored and stored together; a killed run loses at most these."""
PER_REPORT = 10
"""Rows between two reports of the progress."""


class Config(BaseModel):
    """`region` (as in US, DE): the country of telephone numbers without a country code; None: they are not found.

    The input `reference`, a GGUF model, measures coherence and counts tokens. It reads `slots` rows at a time; an
    answer that does not fit `context` tokens (None: the model's, at most 4096) is not scored.
    """

    model_config = ConfigDict(extra="forbid")
    region: str | None = Field("US", pattern="^[A-Z]{2}$")
    slots: int = Field(8, ge=1)
    context: int | None = Field(None, ge=16)


def estimate(config: Config, given: Given) -> Estimate:
    """The cost of reading with a model is not estimated."""
    return uncounted() if "reference" in given.inputs else Estimate()


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> statistics.jsonl: for each row {"id", and a value by rule}, in the order of the pool."""
    rows = examples_of(inputs["pool"])
    checkpoint, total, done, unscored = out / CHECKPOINT, rows_of(inputs["pool"]), 0, 0
    checkpoint.mkdir(exist_ok=True)
    with ExitStack() as stack, open(out / STATISTICS, "w", encoding="utf-8", newline="\n") as file:
        reference = _open(config, inputs, context, stack)
        while chunk := list(islice(rows, CHUNK)):
            stored = checkpoint / f"{done:09}.jsonl"
            if not stored.is_file():
                lines = []
                for line in _lines(chunk, config, reference):
                    lines.append(line)
                    if len(lines) % PER_REPORT == 0:
                        context.progress(done + len(lines), total, {})
                write_text(stored, "".join(lines))
            text = stored.read_text("utf-8")
            file.write(text)
            unscored += text.count('"coherence": null')
            done += len(chunk)
            context.progress(done, total, {})
    found: dict[str, Any] = {"rows": done}
    if unscored:
        found["warnings"] = [f"{unscored} answers do not fit the reference model's context and are not scored"]
    return found


def _open(config: Config, inputs: Mapping[str, Artifact], context: Context, stack: ExitStack) -> LlamaEngine | None:
    if "reference" not in inputs:
        return None
    model = inputs["reference"].path / "model.gguf"
    engine = LlamaEngine(model, slots=config.slots, context=config.context, threads=context.threads, lookup=False)
    return stack.enter_context(closing(engine))


def _lines(rows: Sequence[Example], config: Config, reference: LlamaEngine | None) -> Iterator[str]:
    for row, read in zip(rows, _read(rows, reference, config.slots), strict=True):
        found: dict[str, Any] = {
            "id": row.id,
            "length": length.measure(row),
            "boilerplate": boilerplate.measure(row),
            "copyright": copyright.measure(row),
            "offensive": offensive.measure(row),
            "personal_data": personal_data.measure(row, config.region),
        }
        if reference is not None:
            found["length"]["tokens"] = len(reference.tokenizer.encode(whole_text(row)))
            found["coherence"] = read
        yield json.dumps(found, ensure_ascii=False) + "\n"


def _read(rows: Sequence[Example], reference: LlamaEngine | None, slots: int) -> Iterator[float | None]:
    """Nats per token of each answer; None without a model, or if question and answer do not fit its context."""
    if reference is None:
        yield from (None for _ in rows)
        return

    def nats(row: Example) -> float | None:
        try:
            score = reference.score(Request(messages=row.messages), row.answer)
        except RequestError:
            return None
        return round(score.nats / max(score.tokens, 1), 6)

    with ThreadPoolExecutor(slots) as pool:
        yield from pool.map(nats, rows)
