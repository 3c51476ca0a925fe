"""`import cogumi` as a library: the exported names, asking from Python, and every example of docs/python.md."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import cogumi
from cogumi import Message, RequestError
from support.bundle import make_bundle

DOCS = Path(cogumi.__file__).parents[2] / "docs" / "python.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```", DOCS.read_text("utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `runs/smollm2/bundle` is a bundle of pico models."""
    root = tmp_path_factory.mktemp("api")
    made = make_bundle(root / "made")
    (root / "runs" / "smollm2").mkdir(parents=True)
    made.rename(root / "runs" / "smollm2" / "bundle")
    return root


@pytest.fixture(scope="module")
def bot(folder):
    with cogumi.open(str(folder / "runs" / "smollm2" / "bundle"), threads=1, state=folder / "kept") as opened:
        yield opened


def test_exported_names_are_sorted_and_exist():
    assert cogumi.__all__ == sorted(cogumi.__all__)
    assert all(getattr(cogumi, name) is not None for name in cogumi.__all__)
    assert set(cogumi.__all__) <= set(dir(cogumi))
    with pytest.raises(AttributeError, match="has no attribute 'opens'"):
        _ = cogumi.opens


def test_import_loads_no_models_or_model_libraries():
    code = "import sys, cogumi; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "llama_cpp", "numpy", "pydantic", "fastapi", "transformers", "tokenizers", "openai", "rich"}
    assert not set(done.stdout.split()) & heavy


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_of_the_python_document_runs(folder, number):
    done = subprocess.run([sys.executable, "-c", EXAMPLES[number]], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_question_may_be_text_a_message_or_a_conversation(bot):
    text = "What is 2 + 3?"
    message = {"role": "user", "content": text}
    answers = [
        bot.ask(q, max_tokens=8) for q in (text, Message("user", text), message, [message], (Message(**message),))
    ]
    assert len({reply.text for reply in answers}) == 1
    assert all(reply.p_correct == pytest.approx(0.7) and reply.tier for reply in answers)
    assert len({reply.id for reply in answers}) == len(answers)


def test_stream_text_equals_the_reply(bot):
    stream = bot.stream("What is 2 + 3?", max_tokens=8, mode="fast")
    pieces = list(stream)
    assert "".join(pieces) == stream.reply.text
    assert bot.stream("What is 2 + 3?", max_tokens=8, mode="fast").reply.text == stream.reply.text


def test_conversation_keeps_only_complete_turns(bot):
    chat = bot.chat(max_tokens=8, user="ada")
    first = chat.ask("What is 2 + 3?")
    assert [m.role for m in chat.messages] == ["user", "assistant"]
    stream = chat.stream("And 3 + 4?")
    next(iter(stream))
    stream.close()
    assert len(chat.messages) == 2
    chat.ask("And 3 + 4?")
    assert [m.content for m in chat.messages[:1]] == ["What is 2 + 3?"]
    assert len(chat.messages) == 4
    chat.rate(right=True)
    bot.feedback(first.id, right=False, user="ada")
    chat.clear()
    assert chat.messages == ()


def test_score_and_embed(bot):
    score = bot.score("What is 2 + 3?", "5")
    assert score.nats > 0
    assert score.tokens >= 1
    assert bot.embed(["one", "two"]).shape == (2, 64)
    assert "cogumi:base" in bot.models


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        ("hello", {"max_token": 3}, "unknown option 'max_token'; did you mean 'max_tokens'?"),
        ([], {}, "there are no messages"),
        ([{"role": "user"}], {}, "is not a message"),
        ([{"role": "robot", "content": "x"}], {}, "unknown role 'robot'; use one of system, user, assistant"),
        ([3], {}, "3 is not a message"),
        ({"role": "user", "content": 3}, {}, "is not a message"),
    ],
)
def test_invalid_question_is_refused_in_one_line(bot, question, options, message):
    with pytest.raises(RequestError, match=re.escape(message)) as caught:
        bot.ask(question, **options)
    assert "\n" not in str(caught.value)


def test_feedback_on_an_unknown_answer_is_refused(bot):
    with pytest.raises(RequestError):
        bot.feedback("no-such-answer", right=True)
