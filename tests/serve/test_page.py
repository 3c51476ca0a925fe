"""The page without a browser: conversations, its client of the API, who may open it."""

import asyncio
import threading
import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.errors import RequestError
from cogumi.serve.api_keys import KeyFile
from cogumi.serve.page.actions import Settings
from cogumi.serve.page.api_client import ApiClient
from cogumi.serve.page.conversations import Conversation
from support.page import RatedScripted, paged
from support.serve import Scripted, raw, ready
from support.waiting import PATIENCE, until

KNOWN = {"tier": "modifier:math", "route": "modifier", "p_correct": 0.99, "accepted": True}
UNSURE = {"tier": "base", "route": "low_confidence", "p_correct": 0.2, "accepted": False}
TURNS = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant"]),
            "content": st.text(max_size=20),
            "cogumi": st.sampled_from([None, KNOWN, UNSURE]),
            "right": st.sampled_from([None, True, False]),
        }
    ),
    max_size=6,
)
RATINGS = {True: "Like", False: "Dislike", None: None}
PLAIN = Settings("auto", "auto", False, "", 0.0, 1.0, 512, -1, [])


@given(TURNS)
def test_every_shown_message_belongs_to_its_turn(turns):
    held = Conversation.model_validate({"turns": turns})
    rows = held.rows()
    owners = [held.answer_at(at) for at in range(len(rows))]
    answers = [number for number, turn in enumerate(held.turns) if turn.role == "assistant"]
    assert sorted({number for number in owners if number is not None}) == answers
    assert held.answer_at(len(rows)) is held.answer_at(-1) is None
    assert held.ratings == [RATINGS[held.turns[number].right] for number in answers]
    assert Conversation.model_validate(held.model_dump(mode="json")) == held  # what the browser sends back


def test_what_a_person_sees_of_an_answer():
    told = [{"tier": "base", "signal": "p_correct", "value": 0.2, "threshold": 0.9, "accepted": False, "reason": "a*b"}]
    turns = [
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "Ann.", "cogumi": UNSURE | {"decisions": told}},
    ]
    held = Conversation.model_validate({"turns": turns})
    _, answer, why = held.rows()
    assert answer == {"role": "assistant", "content": "Ann.\n\n*⚠ This answer may be wrong.*"}
    assert why["metadata"] == {"title": "⚠ not sure: best guess of base, 20%, 90% needed", "status": "done"}
    assert why["content"] == "- → base: a\\*b"
    held.turns[1].cogumi = held.turns[1].cogumi.model_copy(update={"accepted": True})
    assert held.rows()[1]["content"] == "Ann."
    assert held.markdown() == "# Who?\n\n**You**\n\nWho?\n\n**Answer**\n\nAnn.\n\n> sure: base, 20%, 90% needed\n"


def test_program_keeps_its_indentation():
    for text in ("def f(a):\n    return a", "import re\n", "@cache\ndef f(): ...", "from a.b import c", "class A(B):"):
        (row,) = Conversation.model_validate({"turns": [{"role": "assistant", "content": text}]}).rows()
        assert row["content"] == f"```python\n{text}\n```"
    for text in ("define it", "from Rome to Oslo", "classes: two", "important", "a\n```python\ndef f(): ...\n```"):
        (row,) = Conversation.model_validate({"turns": [{"role": "assistant", "content": text}]}).rows()
        assert row["content"] == text


def test_title_is_the_beginning_of_the_first_question():
    asked = Conversation.model_validate({"turns": [{"role": "user", "content": "Why\nis " + "the sky blue " * 9}]})
    assert asked.title == "Why is the sky blue the sky blue the sk…"
    assert len(asked.title) == 40
    assert Conversation().title == "New conversation"


def test_settings_become_a_request_that_the_server_honours():
    held = Conversation.model_validate({"user": "u", "turns": [{"role": "user", "content": "echo abc"}]})
    engine = RatedScripted()
    every = Settings("fast", "code", True, "Be short.", 0.5, 0.9, 64, 7, [{"question": "a", "answer": "b"}])
    with ready(lambda: engine) as port:
        pieces = collected(port, every.body(held))
        plain = collected(port, PLAIN.body(held))
    assert "".join(piece.text for piece in pieces) == "abc"
    assert pieces[-1].cogumi == plain[-1].cogumi
    assert "ignored" not in pieces[-1].cogumi
    asked, default = engine.requests
    assert [(m.role, m.content) for m in asked.messages] == [("system", "Be short."), ("user", "echo abc")]
    assert (asked.mode, asked.adapter, asked.abstain, asked.temperature) == ("fast", "code", True, 0.5)
    assert (asked.top_p, asked.max_tokens, asked.seed, asked.user) == (0.9, 64, 7, "u")
    assert asked.examples == (("a", "b"),)
    assert (default.mode, default.adapter, default.abstain, default.seed) == (None, None, False, None)
    assert [m.role for m in default.messages] == ["user"]


def collected(port, body):
    async def read():
        return [piece async for piece in ApiClient(f"http://127.0.0.1:{port}").answer(None, body)]

    return asyncio.run(read())


def chat(text):
    return {"model": "cogumi", "messages": [{"role": "user", "content": text}]}


def test_client_reports_what_the_server_says():
    engine = RatedScripted()
    with ready(lambda: engine) as port:
        for text, message in (
            ("busy", "all 8 slots are taken"),
            ("long", "the prompt has 600 tokens"),
            ("late ab", "the context is full"),
        ):
            with pytest.raises(RequestError, match=message):
                collected(port, chat(text))
        client = ApiClient(f"http://127.0.0.1:{port}")
        models = asyncio.run(client.models(None))
        assert {model["id"]: model["kind"] for model in models} == dict(Scripted.models)
        assert all("feedback" in model["capabilities"] for model in models)
        asyncio.run(client.rate(None, "x-1", True, "u"))
        assert engine.rated == [("x-1", True, "u")]
        with pytest.raises(RequestError, match="no such answer"):
            asyncio.run(client.rate(None, "unknown", True, "u"))
    with pytest.raises(RequestError, match="the server does not answer"):
        asyncio.run(client.models(None))


def test_closing_a_stream_frees_the_slot():
    engine = RatedScripted()

    async def read_a_little(port):
        stream = ApiClient(f"http://127.0.0.1:{port}").answer(None, chat("slow"))
        async for piece in stream:
            if piece.text:
                break
        await stream.aclose()

    with ready(lambda: engine) as port:
        asyncio.run(read_a_little(port))
        until(lambda: engine.running == 0)


def test_page_is_served_below_any_prefix():
    for prefix in ("", "/llm"):
        with paged(prefix=prefix) as port:
            status, _, data = raw(port, "GET", f"{prefix}/ui/")
            assert status == 200
            assert f"http://127.0.0.1:{port}{prefix}/ui".encode() in data
            assert b"window.cogumi" in data


def test_page_of_a_server_with_keys_asks_for_one(tmp_path):
    keys = KeyFile(tmp_path / "keys.json")
    secret = keys.add("anna")
    keys.add("otto")

    def signed_in(name, key):
        body = urllib.parse.urlencode({"username": name, "password": key})
        form = {"content-type": "application/x-www-form-urlencoded"}
        status, headers, _ = raw(port, "POST", "/ui/login", body, form)
        return status, headers.get_all("set-cookie") or []

    with paged(keys=keys) as port:
        assert raw(port, "GET", "/v1/models")[0] == 401
        assert raw(port, "GET", "/uix")[0] == 401
        assert b"auth_required" in raw(port, "GET", "/ui/")[2]
        assert raw(port, "GET", "/ui/config")[0] == 401
        assert raw(port, "POST", "/ui/gradio_api/upload", b"x")[0] == 401
        assert signed_in("anna", "wrong")[0] == signed_in("otto", secret)[0] == 400
        status, cookies = signed_in("anna", secret)
        assert status == 200
        held = "; ".join(cookie.split(";")[0] for cookie in cookies)
        assert raw(port, "GET", "/ui/config", headers={"cookie": held})[0] == 200


def test_page_needs_the_server_only_when_it_is_used():
    """The page opens while the bundle is loading."""
    held = threading.Event()

    def load():
        held.wait(PATIENCE)
        return RatedScripted()

    with paged(load) as port:
        assert raw(port, "GET", "/ui/")[0] == 200
        assert raw(port, "GET", "/ready")[0] == 503
        held.set()
        until(lambda: raw(port, "GET", "/ready")[0] == 200)
