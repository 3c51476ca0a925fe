"""A model without calibration: it answers, P(correct) is None, nothing is accepted."""

import pytest

import cogumi
from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import BundleError, CogumiError
from support.pico import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bare")
    export_model(make_model(folder / "model"), folder / "model.gguf")
    return folder


@pytest.mark.parametrize("name", ["model.gguf", "model"])
def test_a_file_and_a_folder_answer_without_confidence(model, name):
    with cogumi.open(model / name, slots=2, threads=1) as bot:
        (line,) = bot.missing
        assert "not calibrated" in line
        assert "cogumi adopt" in line
        reply = bot.ask("What is 3 + 4?", max_tokens=5)
        assert reply.tokens
        assert reply.p_correct is None
        assert not reply.accepted
        assert reply.tier == "base"
        assert any("not calibrated" in decision.reason for decision in reply.decisions)


def test_conversations_and_memory_work(model, tmp_path):
    with cogumi.open(model / "model.gguf", slots=2, threads=1, state=tmp_path / "state") as bot:
        chat = bot.chat(user="ann", max_tokens=4)
        chat.ask("one")
        chat.ask("two")
        assert len(chat.messages) == 4
        assert bot.forget("ann") == 2


def test_an_answer_without_a_limit_ends_at_the_context(model):
    with cogumi.open(model / "model.gguf", slots=1, threads=1, context=64) as bot:
        reply = bot.ask("What is 3 + 4?")
        assert reply.usage.prompt_tokens + reply.usage.completion_tokens <= 64
        assert reply.finish_reason in ("stop", "length")


def test_options_that_need_a_calibration_are_refused(model):
    with pytest.raises(CogumiError, match="a model without calibration"):
        cogumi.open(model / "model.gguf", reuse="exact")


def test_other_files_are_refused_in_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(BundleError, match="neither a bundle nor a GGUF file"):
        cogumi.open(tmp_path / "notes.txt")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(BundleError):
        cogumi.open(tmp_path / "cut.gguf")
