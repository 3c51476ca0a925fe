"""A remembered answer is the engine's own, and what may differ is never remembered."""

import pytest

from cogumi.compress.gguf.export import export_model
from cogumi.core.types import Message, Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.evaluate.remembering import RememberingEngine
from support.pico import make_model

ASKED = Request(messages=(Message("user", "What is 3 + 4?"),), max_tokens=6, speculate=False)


class Counted:
    """Counts the calls of an engine."""

    def __init__(self, engine):
        self.engine, self.generated, self.readings = engine, 0, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, request):
        self.generated += 1
        return self.engine.generate(request)

    def read(self, request):
        self.readings += 1
        return self.engine.read(request)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("remembering")
    export_model(make_model(folder / "model"), folder / "model.gguf")
    opened = LlamaEngine(folder / "model.gguf", slots=2, context=128, threads=1)
    yield opened
    opened.close()


def test_a_repeated_request_is_answered_once(engine):
    counted = Counted(engine)
    remembering = RememberingEngine(counted)
    from dataclasses import replace

    first = final_reply(remembering.generate(replace(ASKED, hidden=True)))
    assert final_reply(remembering.generate(ASKED)) == first
    assert [e.id for e in remembering.generate(ASKED) if e is not first][: len(first.tokens)] == [
        t.id for t in first.tokens
    ]
    assert counted.generated == 1
    remembering.generate(ASKED).close()  # as every generation
    assert remembering.read(ASKED) == remembering.read(ASKED)
    assert counted.readings == 1
    assert remembering.tokenizer is engine.tokenizer


def test_other_requests_are_asked_again(engine):
    from dataclasses import replace

    counted = Counted(engine)
    remembering = RememberingEngine(counted)
    for request in (ASKED, replace(ASKED, hidden=True), replace(ASKED, max_tokens=3)):
        final_reply(remembering.generate(request))
    assert counted.generated == 3
    for _ in range(2):
        final_reply(remembering.generate(replace(ASKED, temperature=1.0, seed=1)))
    assert counted.generated == 5
