"""The chat in the terminal: banner, line below an answer, commands, Ctrl-C, questions of several lines, Markdown."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cogumi.cascade.asking import Conversation
from cogumi.cascade.modes import Settings
from cogumi.cli import chat, console
from cogumi.cli.answer_stream import AnswerStream, finished
from cogumi.core.types import Decision, Reply, Token, Usage
from cogumi.engine.presentation import verdict

SURE = Decision("modifier:math", "p_correct", 0.93, 0.84, True, "meets the threshold")
UNSURE = Decision("modifier:math", "p_correct", 0.66, 0.84, False, "misses the threshold")
REPLY = Reply(
    "7", (), "stop", Usage(), decisions=(UNSURE,), tier="modifier:math", route="low_confidence", p_correct=0.66
)


class Scripted:
    """An engine that answers each question with a script: text pieces, or an error to raise instead of one."""

    def __init__(self, *scripts):
        self.scripts, self.asked, self.cancelled = list(scripts), [], 0

    def generate(self, request):
        self.asked.append(request)
        return self._events(self.scripts.pop(0))

    def _events(self, script):
        try:
            for piece in script:
                if isinstance(piece, BaseException):
                    raise piece
                yield Token(0, piece, 0.0, 0.0, 0.0)
            yield Reply(
                "".join(script),
                (),
                "stop",
                Usage(),
                decisions=(UNSURE,),
                tier="modifier:math",
                route="low_confidence",
                p_correct=0.66,
            )
        except (GeneratorExit, KeyboardInterrupt):
            self.cancelled += 1
            raise


def talk(monkeypatch, capsys, engine, *lines):
    """The output of a chat with these lines typed; an exception is raised at the prompt."""
    typed = iter(lines)

    def read(prompt):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    conversation = Conversation(engine, mode=None)
    chat.chat_loop(conversation, Settings(), "Sums", ("math", "names", "tools"))
    return conversation, capsys.readouterr().out


def test_banner_names_bundle_and_topics(monkeypatch, capsys):
    _, shown = talk(monkeypatch, capsys, Scripted())
    assert shown.startswith("Sums: questions about math, names and tools\n")
    assert shown.endswith("chat ended\n")
    assert chat.topics(("base", "tools", "math")) == ("math", "tools")
    assert chat.banner("Sums", ()) == "Sums"
    assert chat.banner("Sums", ("math",)) == "Sums: questions about math"


def test_one_line_below_an_answer_and_all_reasons_on_request(monkeypatch, capsys):
    _, shown = talk(monkeypatch, capsys, Scripted(["7"]), "/why", "What is 3 + 4?")
    assert "there is no answer yet" in shown
    assert "7\n  not sure: best guess of modifier math, 66%, 84% needed\n" in shown
    assert "misses the threshold" not in shown
    _, shown = talk(monkeypatch, capsys, Scripted(["7"]), "What is 3 + 4?", "/why")
    assert "misses the threshold" in shown


def test_first_interrupt_cancels_the_answer_and_the_next_ends_the_chat(monkeypatch, capsys):
    engine = Scripted(["It ", KeyboardInterrupt()], ["7"])
    conversation, shown = talk(monkeypatch, capsys, engine, "What is 3 + 4?", "again", KeyboardInterrupt(), "unread")
    assert "answer cancelled" in shown
    assert engine.cancelled == 1
    assert [m.content for m in conversation.messages] == ["again", "7"]  # the cancelled turn is not part of the talk
    assert len(engine.asked) == 2
    assert shown.endswith("\nchat ended\n")


def test_mode_alone_shows_the_mode(monkeypatch, capsys):
    conversation, shown = talk(monkeypatch, capsys, Scripted(), "/mode fast", "/mode", "/mode nope")
    assert conversation.options["mode"] == "fast"
    assert shown.count("mode: fast (of auto, fast, balanced, ") == 3
    conversation, shown = talk(monkeypatch, capsys, Scripted(), "/mode fast", "/mode auto")
    assert conversation.options["mode"] is None


def reply(**changes):
    values = {name: getattr(REPLY, name) for name in ("decisions", "tier", "route", "p_correct", "accepted")}
    return Reply("7", (), "stop", Usage(), **values | changes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "not sure: best guess of modifier math, 66%, 84% needed"),
        ({"p_correct": 0.93, "decisions": (SURE,), "accepted": True}, "sure: modifier math, 93%, 84% needed"),
        ({"p_correct": None}, "not calibrated: answer of modifier math"),
        ({"p_correct": None, "tier": "", "decisions": ()}, "not calibrated: answer of the model"),
        ({"route": "abstained"}, "declined: modifier math, 66%"),
        ({"route": "cache", "accepted": True}, "sure: an earlier accepted answer, repeated"),
        (
            {"decisions": (Decision("base", "p_correct", 0.5, 1.0, False, ""),), "tier": "base", "p_correct": 0.5},
            "not sure: best guess of base, 50%, nothing is certified",
        ),
    ],
)
def test_verdict(changes, line):
    assert verdict(reply(**changes)) == line


def test_question_of_several_lines(monkeypatch, capsys):
    engine = Scripted(["7"], ["8"], ["9"])
    talk(monkeypatch, capsys, engine, '"""What is', "", "3 + 4?", 'Say it."""', '"""one line"""', "plain")
    asked = [request.messages[-1].content for request in engine.asked]
    assert asked == ["What is\n\n3 + 4?\nSay it.", "one line", "plain"]


def test_system_prompt_begins_a_new_conversation(monkeypatch, capsys):
    engine = Scripted(["7"], ["8"], ["9"], ["10"])
    lines = ("a", "/system Be short.", "b", "c", "/system", "d")
    _, shown = talk(monkeypatch, capsys, engine, *lines)
    asked = [[(m.role, m.content) for m in request.messages] for request in engine.asked]
    system = ("system", "Be short.")
    assert asked == [
        [("user", "a")],
        [system, ("user", "b")],
        [system, ("user", "b"), ("assistant", "8"), ("user", "c")],
        [("user", "d")],
    ]
    assert "new conversation, with this system prompt" in shown
    assert "new conversation, without a system prompt" in shown


def test_conversation_is_saved_in_two_forms(monkeypatch, capsys, tmp_path):
    markdown, plain, far = tmp_path / "talk.md", tmp_path / "talk.json", tmp_path / "no" / "x.md"
    far.parent.write_text("a file")
    lines = [
        f"/save {markdown}",
        "What is 3 + 4?",
        "/save",
        *(f"/save {file}" for file in (markdown, plain, plain, far)),
    ]
    _, shown = talk(monkeypatch, capsys, Scripted(["def f():\n  pass"]), *lines)
    assert "there is no answer yet" in shown
    assert "name the file: /save talk.md" in shown
    assert f"{plain} exists already" in shown
    assert f"cannot write {far}" in shown
    assert markdown.read_text() == (
        "# Conversation\n\n**You**\n\nWhat is 3 + 4?\n\n**Answer**\n\n```python\ndef f():\n  pass\n```\n\n"
        "> not sure: best guess of modifier math, 66%, 84% needed\n"
    )
    (row,) = json.loads(plain.read_text())
    assert (row["question"], row["answer"], row["p_correct"]) == ("What is 3 + 4?", "def f():\n  pass", 0.66)


def terminal(width=40):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=20, color_system=None)


def test_bar_shows_p_correct_in_a_terminal(monkeypatch, capsys):
    console.print_verdict(reply())
    assert capsys.readouterr().out == "\n  not sure: best guess of modifier math, 66%, 84% needed\n"
    screen = terminal(80)
    monkeypatch.setattr(console, "STDOUT", screen)
    for changes in ({}, {"p_correct": 0.0}, {"p_correct": 1.0}, {"p_correct": None}):
        console.print_verdict(reply(**changes))
    bars = [line.strip().partition(" ")[0] for line in screen.file.getvalue().splitlines() if line]
    assert bars == ["███████░░░", "░░░░░░░░░░", "██████████", "not"]


def streamed(text, size=3, width=40):
    """What stays on a terminal after the pieces of a text."""
    screen = terminal(width)
    with AnswerStream(screen) as stream:
        for at in range(0, len(text), size):
            stream.add(text[at : at + size])
    lines = [""]
    for part in re.split("(\\x1b\\[[?0-9]*[A-Za-z]|\\r|\\n)", screen.file.getvalue()):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[1A":
            lines.pop()
        elif part == "\x1b[2K":
            lines[-1] = ""
        elif not part.startswith("\x1b[") and part != "\r":
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def test_markdown_is_rendered_in_a_terminal_as_it_comes():
    shown = streamed("**Sum**\nof *two*\n\n1. one\n2. two\n\n```python\ndef f(a):\n\n    return a\n```\n\nEnd.")
    assert shown.split() == ["Sum", "of", "two", "1", "one", "2", "two", "def", "f(a):", "return", "a", "End."]
    assert " 1 one\n 2 two\n" in shown
    assert " def f(a):\n\n     return a\n" in shown
    assert streamed("def f(a):\n\n    return a").strip("\n").split("\n")[-1] == "     return a"
    program = "import re\nx = 1\nif x:\n    y = 2\n\nprint(y)"
    assert [line[1:] for line in streamed(program).strip("\n").split("\n")] == program.split("\n")
    assert "http://x.y" in streamed("[a link](http://x.y)")
    assert "\x1b]" not in streamed("a\x1b]0;title\x07b")


@given(st.text("ab `*-1.\n#|>", max_size=60), st.text("ab `\n-", max_size=20))
def test_finished_blocks_stay_finished(text, more):
    assert finished(text + more) >= finished(text)


@given(st.lists(st.text("ab", min_size=1, max_size=9), max_size=30), st.integers(1, 9), st.integers(10, 40))
def test_every_word_of_an_answer_is_shown_once(words, size, width):
    text = "".join(f"{word}{' ' if number % 3 else chr(10) * (1 + number % 2)}" for number, word in enumerate(words))
    assert streamed(text, size, width).split() == text.split()
