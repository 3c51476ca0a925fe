"""The recipe that `cogumi adopt` writes, as YAML with comments (SPEC M4)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cogumi.core.model_files import is_short_name
from cogumi.data.sources.hub import is_hub_id
from cogumi.data.sources.survey import OWN, Survey, files_by_domain

SHARES = {"train": 30, "selection": 10, "fit": 20, "threshold": 20, "heldout": 20}
"""60% to fit with, 20% for the guarantee, 20% for the report."""
WEIGHTS = "weights"
"""The step whose model is trained."""
FIRST, FIRST_QUESTIONS = "first_answers", 32
"""The step that shows how long the model's answers are, and its number of questions."""


@dataclass(frozen=True, slots=True)
class Adoption:
    """What to build: a model (as for stage `gguf_file`), the files of a survey, and the domains that get a modifier.

    `root` is the folder of the recipe, where its relative paths start. Modifiers are trained on the upper `layers`.
    Answers have up to `max_tokens` tokens; the context has room for `room` after the longest question.
    `type`: the model is requantized to it; None: it stays as it is.
    """

    name: str
    model: str
    survey: Survey
    root: Path
    e: float
    layers: int
    max_tokens: int
    room: int
    copy: bool = False
    type: str | None = None


def _flow(value: Any) -> str:
    """A value in YAML's flow style, which JSON is."""
    return json.dumps(value, ensure_ascii=False)


def _path(path: Path, root: Path) -> str:
    return str(path) if is_hub_id(path) else Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()


def step_names(domain: str) -> tuple[str, str, str]:
    """The steps of a domain's modifier: its training, its GGUF file, its gain."""
    return f"modifier_{domain}", f"modifier_{domain}_gguf", f"gain_{domain}"


def _beginning(plan: Adoption) -> str:
    """Name, data and base."""
    domains = plan.survey.gradable
    files = {name: [_path(p, plan.root) for p in paths] for name, paths in files_by_domain(domains).items()}
    graders = {d.name: d.grader for d in domains if d.grader != OWN}
    names = [d.name for d in domains]
    read = {key: value for key, value in asdict(plan.survey.reading).items() if value}
    reading = f"\n      reading: {_flow(dict.fromkeys(files, read))}" if read else ""
    model = plan.model if is_short_name(plan.model, Path()) else _path(Path(plan.model), plan.root)
    about = f"requantized to {plan.type}: not its own bytes" if plan.type else "where it lies"
    base = {"model": model} | ({"type": plan.type} if plan.type else {})
    return f"""# Written by `cogumi adopt`. Change it and run `cogumi build` on this file; finished steps are kept.
name: {plan.name}
seed: 7
steps:
  # The questions. A grader judges an answer; `docs/your-data.md` lists them.
  - name: rows
    stage: load
    config:
      files: {_flow(files)}
      domains: {_flow(names)}
      graders: {_flow(graders)}{reading}

  # Five sets: training, choice of forms, fit of the gates, the guarantee, the report.
  - {{name: data, stage: split, inputs: {{pool: rows}}, config: {_flow(SHARES)}}}

  # The model, {about}.
  - {{name: base, stage: gguf_file, config: {_flow(base)}}}
"""


def first_answers(plan: Adoption, max_tokens: int) -> str:
    """The recipe up to answers to a few training questions."""
    config = {"rows": FIRST_QUESTIONS, "max_tokens": max_tokens}
    step = f"  - {{name: {FIRST}, stage: respond, inputs: {{examples: data, model: base}}, config: {_flow(config)}}}\n"
    return _beginning(plan) + step


def head(plan: Adoption) -> str:
    """Name, data, base and reader."""
    return f"""{_beginning(plan)}
  # Its answers to the training questions, and heads on its hidden states that read a question.
  - name: responses
    stage: respond
    inputs: {{examples: data, model: base}}
    config: {{max_tokens: {plan.max_tokens}}}
  - {{name: reader, stage: reader, inputs: {{examples: data, responses: responses}}}}
"""


def modifiers(plan: Adoption, domains: Sequence[str]) -> str:
    """A LoRA adapter for each domain, trained on what the base failed, and its gain on other questions."""
    if not domains:
        return ""
    tokens = plan.max_tokens
    text = f"""
  # Modifiers: adapters trained on the questions that the base failed and, so that they keep what it knows, on some
  # that it answered (the share `rehearsal` of the rows). Where answers are a choice, on questions at random: failures
  # alone would teach which option the base neglects.
  - {{name: {WEIGHTS}, stage: convert, inputs: {{gguf: base}}}}
"""
    choices = {d.name for d in plan.survey.gradable if d.grader == "choice"}
    for domain in domains:
        trained, exported, gain = step_names(domain)
        rows = "random" if domain in choices else "failures"
        text += f"""  - name: {trained}
    stage: modifier
    inputs: {{examples: data, responses: responses, model: {WEIGHTS}}}
    config:
      domain: {domain}
      rows: {rows}
      rehearsal: 0.35
      layers: {plan.layers}
      loop: {{steps: 75, batch: 8, lr: 0.002, warmup: 10, evaluate_every: 25, precision: auto}}
  - {{name: {exported}, stage: gguf, inputs: {{adapter: {trained}, model: {WEIGHTS}}}}}
  - name: {gain}
    stage: gain
    inputs: {{examples: data, base: base, adapter: {exported}}}
    config: {{domain: {domain}, max_tokens: {tokens}}}
"""
    return text


def tail(plan: Adoption, domains: Sequence[str]) -> str:
    """Calibration, bundle and report with the modifiers that are kept."""
    kept = "".join(f", modifier_{domain}: {step_names(domain)[1]}" for domain in domains)
    tokens = plan.max_tokens
    return f"""
  # Answers to the questions of the other sets. Of the answers that are accepted as sure, at most the share `e` may be
  # wrong, with 95% confidence; another `e` does not ask again.
  - name: answers
    stage: answers
    inputs: {{data: data, base: base, difficulty: reader, router: reader{kept}}}
    config: {{max_tokens: {tokens}}}
  - {{name: calibration, stage: calibrate, inputs: {{data: data, answers: answers}}, config: {{e: {plan.e}}}}}

  - name: bundle
    stage: bundle
    inputs: {{base: base, difficulty: reader, router: reader, calibration: calibration, examples: data{kept}}}
    config: {_flow({"title": plan.name} | ({"copy_base": True} if plan.copy else {}))}

  - {{name: report, stage: report, inputs: {{data: data, bundle: bundle}}, config: {{max_tokens: {tokens}}}}}
"""


def whole(plan: Adoption, domains: Sequence[str]) -> str:
    """The whole recipe."""
    return head(plan) + modifiers(plan, domains) + tail(plan, domains)
