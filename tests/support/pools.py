"""Pools of examples, and runs of the stages that turn a pool into a pool."""

import json

from cogumi.core import artifact
from cogumi.core.registry import stage
from cogumi.core.stage import Context
from cogumi.core.types import Example, Message
from cogumi.data.curation.pool_writer import DROPPED
from cogumi.data.examples import POOL, example_id, read_examples, write_examples


def row(question, answer="yes", number=0, domain="general", difficulty=0, **meta):
    """An example with one question; `number` is its line in the file."""
    messages = (Message("user", question),)
    return Example(example_id(domain, messages), domain, difficulty, messages, answer, f"rows.jsonl:{number}", meta)


def rows(*pairs):
    """Examples of (question, answer) pairs, numbered from 1."""
    return [row(question, answer, number) for number, (question, answer) in enumerate(pairs, 1)]


def pool(folder, examples):
    """A finished pool with these rows."""
    write_examples(folder / POOL, examples)
    return finished(folder, "pool", {"rows": len(examples)})


def finished(folder, kind, metrics):
    """The artifact of a folder that a stage has filled."""
    return artifact.finish(folder, kind=kind, fingerprint="0", parents={}, metrics=metrics, environment={})


def run(name, inputs, out, seed=0, root=None, progress=None, **config):
    """Run a stage into `out`; its artifact."""
    module = stage(name)
    out.mkdir(parents=True, exist_ok=True)
    context = Context(seed, 1, root or out, progress or (lambda done, total, figures: None))
    metrics = module.run(module.Config(**config), inputs, out, context)
    return finished(out, module.KIND, metrics)


def questions(kept):
    """The questions of a pool, in order."""
    return [example.messages[-1].content for example in read_examples(kept.path / POOL)]


def dropped(kept):
    """The rows that a step dropped."""
    return [json.loads(line) for line in (kept.path / DROPPED).read_text("utf-8").splitlines()]
