"""`cogumi.cli.chat`: the banner, one line below an answer, /why and /mode, Ctrl-C, and line breaks between words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.cascade.asking import Conversation
from cogumi.cascade.modes import Settings
from cogumi.cli import chat
from cogumi.cli.console import Wrap, verdict
from cogumi.core.types import Decision, Reply, Token, Usage

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


@given(st.lists(st.text("ab \n", max_size=9), max_size=12), st.integers(4, 12))
def test_lines_break_between_words_only(pieces, width):
    wrap, text = Wrap(width), "".join(pieces)
    shown = "".join(map(wrap.add, pieces)) + wrap.end()
    assert shown.split() == text.split()
    for line in shown.split("\n"):
        assert len(line) <= width or len(line.split()) == 1
    plain = Wrap(None)
    assert "".join(map(plain.add, pieces)) + plain.end() == text
