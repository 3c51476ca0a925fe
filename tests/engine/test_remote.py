"""`RemoteEngine` when the server or the connection fails; test_engine_contract.py tests the normal operation."""

import contextlib
import json
import math
import socket
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import BusyError, ContextError, RequestError
from cogumi.core.registry import engine as registered
from cogumi.core.types import Message, Request, Token
from cogumi.engine.openai_protocol import entries, entropy_bound, to_body
from cogumi.engine.protocol import final_reply
from cogumi.engine.remote import RemoteEngine
from support.engines import pico
from support.remote import free_port
from support.scripted_server import begin, chunk, engine_at, scripted, send
from support.waiting import PATIENCE, until

ASK = Request(messages=(Message("user", "echo abc"),))
RAW = Request(prompt="echo abc")


def refusal(status, message="no", code=None):
    def behave(handler):
        body = json.dumps({"error": {"message": message, "code": code, "type": "x", "param": None}}).encode()
        handler.send_response(status)
        handler.send_header("content-type", "application/json")
        handler.send_header("content-length", str(len(body)))
        handler.send_header("x-should-retry", "false")
        handler.end_headers()
        handler.wfile.write(body)

    return behave


@pytest.mark.parametrize(
    ("behave", "error", "message"),
    [
        (refusal(400, "too long", "context_length_exceeded"), ContextError, "too long"),
        (refusal(400, "This model's maximum context length is 5 tokens"), ContextError, "5 tokens"),
        (refusal(400, "bad\n\nseed"), RequestError, "bad seed"),
        (refusal(404, "no such model"), RequestError, "no such model"),
        (refusal(401, "who?"), RequestError, "COGUMI_REMOTE_KEY"),
        (refusal(429, "full"), BusyError, "full"),
        (refusal(503, "loading"), BusyError, "loading"),
        (refusal(500, "defect"), RequestError, "defect"),
    ],
)
@pytest.mark.parametrize("ask", [ASK, RAW])
def test_http_status_is_mapped_to_an_error(behave, error, message, ask):
    with scripted(behave) as (url, bodies), engine_at(url) as engine:
        with pytest.raises(RequestError, match=message) as raised:
            final_reply(engine.generate(ask))
        assert type(raised.value) is error
        assert "\n" not in str(raised.value)
        assert len(bodies) == 1
        with pytest.raises(error):
            engine.embed(["a"])


def ends_without_done(handler):
    begin(handler)
    send(handler, chunk("ab"))


def ends_without_an_answer(handler):
    begin(handler)
    send(handler, "[DONE]")


def resets(handler):
    begin(handler)
    send(handler, chunk("ab"))
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    handler.connection.shutdown(socket.SHUT_RD)
    handler.connection.close()


def sends_an_error_event(handler):
    begin(handler)
    send(handler, chunk("ab"))
    send(handler, {"error": {"message": "the context is full", "code": "context_length_exceeded"}})
    send(handler, "[DONE]")


def reports_a_content_filter(handler):
    begin(handler)
    send(handler, chunk("ab", "content_filter"))
    send(handler, "[DONE]")


def sends_invalid_json(handler):
    begin(handler)
    send(handler, "{not json")


def sends_malformed_logprobs(handler):
    begin(handler)
    send(handler, {"choices": [{"delta": {"content": "a"}, "logprobs": {"content": [{"token": 5}]}}]})


def sends_html(handler):
    begin(handler, "text/html")
    handler.wfile.write(b"<html>hello</html>")


@pytest.mark.parametrize(
    ("behave", "error", "message"),
    [
        (ends_without_done, RequestError, "ended the stream"),
        (ends_without_an_answer, RequestError, "ended the stream"),
        (sends_html, RequestError, "ended the stream"),
        (resets, RequestError, "no connection|ended the stream"),
        (sends_an_error_event, ContextError, "context is full"),
        (reports_a_content_filter, RequestError, "content_filter"),
        (sends_invalid_json, RequestError, "is not of OpenAI"),
        (sends_malformed_logprobs, RequestError, "is not of OpenAI"),
    ],
)
def test_interrupted_or_malformed_stream_is_an_error(behave, error, message):
    with scripted(behave) as (url, _), engine_at(url) as engine:
        events = engine.generate(ASK)
        with pytest.raises(error, match=message):
            final_reply(events)
        assert list(events) == []


def test_connection_failure_is_an_error():
    with engine_at(f"http://127.0.0.1:{free_port()}/v1") as engine:
        for call in (lambda: final_reply(engine.generate(ASK)), lambda: engine.embed(["a"])):
            with pytest.raises(RequestError, match="no connection"):
                call()


def test_silent_server_times_out():
    over = threading.Event()

    def stays_silent(handler):
        begin(handler)
        send(handler, chunk("ab"))
        over.wait(PATIENCE)

    with scripted(stays_silent) as (url, _), engine_at(url, timeout=0.3) as engine:
        with pytest.raises(RequestError, match="sent nothing"):
            final_reply(engine.generate(ASK))
        assert not over.is_set()
        over.set()


def test_text_without_log_probabilities_gives_tokens_with_nan_signals():
    def plain(handler):
        begin(handler)
        for one in (chunk("ab"), chunk(""), chunk("c", "stop"), "[DONE]"):
            send(handler, one)

    with scripted(plain) as (url, _), engine_at(url) as engine:
        reply = final_reply(engine.generate(ASK))
    assert (reply.text, reply.finish_reason, reply.usage.completion_tokens) == ("abc", "stop", 2)
    assert all(token.id == -1 and math.isnan(token.logprob + token.entropy + token.margin) for token in reply.tokens)


def test_request_body_and_key_sent_to_the_server(monkeypatch):
    def plain(handler):
        begin(handler)
        send(handler, chunk("a", "length"))

    monkeypatch.setenv("OPENAI_API_KEY", "second")
    monkeypatch.setenv("COGUMI_REMOTE_KEY", "first")
    ask = Request(
        messages=(Message("system", "s"), Message("user", "u")),
        max_tokens=7,
        temperature=0.5,
        top_p=0.9,
        stop=("x",),
        seed=0,
        logprobs=9,
        logit_bias={3: -1.5},
        presence_penalty=0.5,
        json_schema='{"type": "object"}',
        adapter="law",
        user="me",
    )
    with scripted(plain) as (url, bodies), engine_at(url, adapters={"law": "m-law"}, extra={"top_k": 0}) as engine:
        final_reply(engine.generate(ask))
        final_reply(engine.generate(Request(prompt=(1, 2))))
    schema = {"name": "answer", "schema": {"type": "object"}, "strict": True}
    assert bodies[0] == {
        "path": "/v1/chat/completions",
        "key": "Bearer first",
        "model": "m-law",
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "stop": ["x"],
        "seed": 0,
        "logprobs": True,
        "top_logprobs": 9,
        "logit_bias": {"3": -1.5},
        "presence_penalty": 0.5,
        "response_format": {"type": "json_schema", "json_schema": schema},
        "user": "me",
        "stream": True,
        "stream_options": {"include_usage": True},
        "top_k": 0,
    }
    assert (bodies[1]["path"], bodies[1]["prompt"], bodies[1]["logprobs"]) == ("/v1/completions", [1, 2], 5)
    assert not {"seed", "stop", "logit_bias", "presence_penalty", "messages"} & bodies[1].keys()


def test_requests_without_an_openai_equivalent_are_refused_by_the_call():
    with scripted(ends_without_done) as (url, bodies), engine_at(url) as engine:
        for wrong, message in (
            (Request(prompt="a", grammar="root ::= [0-9]"), "grammar"),
            (Request(prompt="a", json_schema="{}"), "messages"),
            (Request(messages=ASK.messages, json_schema="{"), "not JSON"),
            (Request(prompt="a", echo=True), "GGUF"),
        ):
            with pytest.raises(RequestError, match=message):
                engine.generate(wrong)
        for call in (lambda: engine.tokenizer, lambda: engine.read(RAW), lambda: engine.score(RAW, "x")):
            with pytest.raises(RequestError, match="GGUF"):
                call()
        assert bodies == []


@pytest.mark.parametrize("entry_count", [3, 4])
def test_echo_with_missing_tokens_is_refused(entry_count):
    """Entries can be assigned to tokens only if there is one per prompt token plus one."""

    def echoes(handler):
        logprobs = {
            "tokens": ["a"] * entry_count,
            "token_logprobs": [None] + [-1.0] * (entry_count - 1),
            "top_logprobs": None,
        }
        begin(handler, "application/json")
        handler.wfile.write(json.dumps({"choices": [{"index": 0, "text": "", "logprobs": logprobs}]}).encode())

    with scripted(echoes) as (url, bodies), engine_at(url, tokenizer=pico().base_q8) as engine:
        ask = Request(prompt=(10, 11, 12))
        if entry_count == 4:
            assert engine.read(ask).surprise == (1.0, 1.0)
        else:
            with pytest.raises(RequestError, match="echo"):
                engine.read(ask)
    assert (bodies[0]["prompt"], bodies[0]["max_tokens"], bodies[0]["echo"]) == ([10, 11, 12], 1, True)


def test_embeddings_that_are_not_vectors_are_refused():
    def each_token(handler):
        begin(handler, "application/json")
        rows = {"object": "list", "data": [{"object": "embedding", "index": 0, "embedding": [[1.0], [2.0]]}]}
        handler.wfile.write(json.dumps(rows).encode())

    with scripted(each_token) as (url, _), engine_at(url) as engine, pytest.raises(RequestError, match="vector"):
        engine.embed(["a"])


@pytest.mark.parametrize("question", ["slow", "think a"])
@pytest.mark.parametrize("how", ["close", "drop", "engine"])
def test_closing_frees_the_servers_slot(slow, question, how):
    """Also when nothing has been answered yet."""
    scripted_engine, url = slow
    with contextlib.closing(RemoteEngine(url, "cogumi", timeout=PATIENCE)) as engine:
        events = engine.generate(Request(messages=(Message("user", question),)))
        until(lambda: scripted_engine.running == 1)
        if question == "slow":
            assert isinstance(next(events), Token)
        if how == "close":
            events.close()
            assert list(events) == []
        elif how == "drop":
            del events
        else:
            engine.close()
            assert final_reply(events).finish_reason == "cancelled"
        scripted_engine.thought.set()
        until(lambda: scripted_engine.running == 0)


def test_concurrent_requests_are_limited_to_the_workers(slow):
    scripted_engine, url = slow
    with contextlib.closing(RemoteEngine(url, "cogumi", workers=2, timeout=PATIENCE)) as engine:
        streams = [engine.generate(Request(messages=(Message("user", "think a"),))) for _ in range(5)]
        until(lambda: scripted_engine.running == 2)
        scripted_engine.thought.set()
        assert [final_reply(stream).text for stream in streams] == ["a"] * 5
    assert scripted_engine.most_running == 2


def test_closed_engine_refuses_requests():
    engine = registered("remote")("http://127.0.0.1:1/v1", "m")
    engine.close()
    engine.close()
    for call in (lambda: engine.generate(ASK), lambda: engine.embed(["a"])):
        with pytest.raises(RequestError, match="closed"):
            call()


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=30), st.integers(1, 30))
@settings(deadline=None)
def test_entropy_of_the_top_logprobs_is_a_lower_bound(logits, k):
    row = np.array(logits)
    logprobs = np.sort(row - np.log(np.exp(row - row.max()).sum()) - row.max())[::-1]
    exact = float(-(np.exp(logprobs) * logprobs).sum())
    bound = entropy_bound(logprobs[:k].tolist())
    assert bound <= exact + 1e-6
    if k >= len(logits):
        assert bound == pytest.approx(exact, abs=1e-6)
    elif k > 1:
        assert bound >= entropy_bound(logprobs[: k - 1].tolist()) - 1e-6


def test_logprob_entries_of_both_openai_formats():
    chat = {
        "content": [
            {
                "token": "x",
                "bytes": [195],
                "logprob": -1.0,
                "top_logprobs": [
                    {"token": "a", "bytes": None, "logprob": -2.0},
                    {"token": "x", "bytes": [195], "logprob": -1.0},
                ],
            }
        ]
    }
    legacy = {
        "tokens": ["bytes:\\xc3", "é"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"é": -1.0, "bytes:\\xc3\\xa9": -3.0}],
    }
    assert entries(chat) == [(b"\xc3", -1.0, ((b"\xc3", -1.0), (b"a", -2.0)))]
    assert entries(legacy) == [(b"\xc3", None, ()), ("é".encode(), -1.0, (("é".encode(), -1.0), ("é".encode(), -3.0)))]
    assert entries(None) == entries({}) == entries({"content": None, "refusal": None}) == []


def test_tools_and_earlier_calls_are_refused_instead_of_dropped():
    called = (Message("user", "Hi"), Message("assistant", "", ('{"name": "map", "arguments": {}}',)))
    for request in (
        Request(messages=called),
        Request(messages=called[:1], tools=('{"name": "map"}',)),
        Request(messages=called[:1], lark="start: /a/"),
    ):
        with pytest.raises(RequestError, match="not passed on to another server"):
            to_body(request, "m")
