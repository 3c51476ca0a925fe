"""Alpaca, Dolly, CodeAlpaca, WizardLM: an instruction, the input it is about, and an output."""

from __future__ import annotations

from cogumi.data.sources.forms.pairs import (
    Form,
    Pair,
    Row,
    answer_text,
    conversation,
    first_of,
    passage_of,
    system_with_tools,
    text,
    with_passage,
)

OUTPUTS = ("output", "response", "completion", "chosen", "answer")


def fits(row: Row) -> bool:
    """An instruction, with or without an output."""
    return "instruction" in row and "instances" not in row


def read(row: Row) -> list[Pair]:
    """One pair. A short "answer" beside the output is the reference: the output is an explanation or a model's text."""
    passage, about = passage_of(row, ("input", "context"))
    short = row.get("answer") not in (None, "") and first_of(row, OUTPUTS) != "answer"
    name = "answer" if short else first_of(row, OUTPUTS)
    if name is None:
        raise ValueError(f"there is no answer: give one of {', '.join(OUTPUTS)}")
    system = first_of(row, ("system", "system_prompt"))
    prompt = system_with_tools(text(row[system], system) if system else "", row.get("tools"))
    question = with_passage(text(row["instruction"], "instruction"), passage)
    used = {"instruction", "input", "context", "history", "tools", name, about or "input", system or "system"}
    if short:
        used |= set(OUTPUTS)
    used |= {other for other in OUTPUTS if row.get(other) == row[name]}
    rejected = row.get("rejected")
    return [
        Pair(
            conversation(question, prompt, row.get("history")),
            answer_text(row[name], name),
            frozenset(used | {"rejected"}),
            rejected=rejected if isinstance(rejected, str) else None,
        )
    ]


FORM = Form("instruction", '{"instruction", "input" or "context", "output"}', fits, read)


def _fits_instances(row: Row) -> bool:
    return "instruction" in row and isinstance(row.get("instances"), list)


def _read_instances(row: Row) -> list[Pair]:
    """A pair for each instance."""
    found = []
    for instance in row["instances"]:
        if not isinstance(instance, dict):
            raise ValueError("instances must be a list of objects")
        passage, _ = passage_of(instance, ("input",))
        question = with_passage(text(row["instruction"], "instruction"), passage)
        answer = answer_text(instance.get("output"), "output")
        found.append(Pair(conversation(question), answer, frozenset({"instruction", "instances"})))
    if not found:
        raise ValueError("instances is empty")
    return found


INSTANCES = Form(
    "self-instruct", '{"instruction", "instances": [{"input", "output"}]}', _fits_instances, _read_instances
)
