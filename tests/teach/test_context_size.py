"""`teach.context_size`: contexts follow the longest question, or name the row that does not fit."""

import pytest

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import DataError
from cogumi.core.types import Example, Message
from cogumi.engine.llama.binding.model import Model, load_tokenizer
from cogumi.teach.context_size import STEP, context_for
from support.pico import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("context")
    export_model(make_model(folder / "model"), folder / "model.gguf")
    return folder / "model.gguf"


def asked(words, source="rows.jsonl:7"):
    return Example("1", "math", 0, (Message("user", "word " * words),), "4", source)


def test_context_holds_the_longest_question_and_its_answer(model):
    tokens = len(load_tokenizer(model).encode("word " * 100))
    found = context_for([model], [asked(3), asked(100)], 32, None)
    assert tokens + 32 < found <= tokens + 32 + STEP + 8  # the template adds a few
    assert found % STEP == 0
    assert context_for([model], [asked(3)], 8, None) == STEP
    assert context_for([model], [asked(3)], 8, 200) == 200


def test_row_that_does_not_fit_is_named_with_the_key_that_limits_it(model):
    assert Model(model, vocabulary_only=True).trained_context == 1024
    with pytest.raises(
        DataError, match=r"rows.jsonl:7 has \d+ tokens and an answer up to 8 .* more than `context: 64`"
    ):
        context_for([model], [asked(3), asked(100)], 8, 64)
    beyond = r"rows.jsonl:7 has \d+ tokens, more than the model's context of 1024: shorten that row"
    with pytest.raises(DataError, match=beyond):
        context_for([model], [asked(3000)], 0, None)
