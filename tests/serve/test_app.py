"""The HTTP server, driven by the real `openai` package over a real socket.

The engine is scripted, so that tests control every event and error; `tests/cli/test_running.py` serves a
real bundle.
"""

import contextlib
import http.client
import json
import re
import threading

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import CogumiError
from cogumi.core.types import Message
from cogumi.serve.app import bind
from support.serve import Scripted, raw, running, send_and_hang_up
from support.waiting import PATIENCE, until


def ask(client, text, model="cogumi", **options):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_list_of_models(client):
    assert [m.id for m in client.models.list()] == list(Scripted.models)
    one = client.models.retrieve("cogumi:base+code")
    assert (one.id, one.object) == ("cogumi:base+code", "model")
    assert one.created > 1_700_000_000
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.retrieve("gpt-4o")
    assert refused.value.code == "model_not_found"


def test_plain_answer(client):
    answer = client.chat.completions.with_raw_response.create(
        model="cogumi", messages=[{"role": "user", "content": "echo hé"}]
    )
    completion = answer.parse()
    assert completion.choices[0].message.content == "hé"
    assert completion.choices[0].finish_reason == "stop"
    assert completion.choices[0].logprobs is None
    assert completion.object == "chat.completion"
    assert completion.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 10,
        "completion_tokens": 3,
        "total_tokens": 13,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    ours = completion.model_extra["cogumi"]
    assert (ours["tier"], ours["route"], ours["p_correct"]) == ("base", "base", 0.9)
    assert ours["decisions"][0]["reason"] == "0.90 >= 0.80"
    assert ours["usage"]["accepted"] == 5
    assert "error" not in completion.model_extra
    assert answer.headers["x-cogumi-tier"] == "base"
    assert answer.headers["x-cogumi-route"] == "base"
    assert answer.headers["x-cogumi-p-correct"] == "0.9000"
    assert answer.headers["x-request-id"].startswith("req_")


def test_request_that_reaches_the_engine(client, engine):
    client.chat.completions.create(
        model="cogumi:fast",
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "echo"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c", "name": "x"},
            {"role": "user", "content": "echo d"},
        ],
        max_tokens=7,
        max_completion_tokens=5,
        temperature=0.5,
        top_p=0.9,
        stop=["\n", "x"],
        seed=3,
        n=2,
        user="me",
        metadata={"a": "b"},
        store=True,
        reasoning_effort="low",
        tools=[],
        presence_penalty=0,
        response_format={"type": "text"},
        extra_body={
            "nobody_knows_this": 1,
            "cogumi": {
                "mode": "fast",
                "speculate": False,
                "abstain": True,
                "session": "s",
                "modifier": "code",
                "examples": [{"question": "q", "answer": "a"}],
                "adapt": False,
            },
        },
    )
    first, second = engine.requests[-2:]
    assert [m.role for m in first.messages] == ["system", "user", "assistant", "user"]
    assert first.messages[1] == Message("user", "echo\nb")
    assert (first.max_tokens, first.temperature, first.top_p, first.stop) == (5, 0.5, 0.9, ("\n", "x"))
    assert (first.mode, first.speculate, first.abstain, first.session) == ("fast", False, True, "s")
    assert (first.examples, first.adapt) == ((("q", "a"),), False)
    assert (first.adapter, first.user) == ("code", "me")
    assert {first.seed, second.seed} == {3, 4}


def test_bias_penalties_and_formats(client, engine):
    ask(client, "echo a", logit_bias={"65": -100, "66": 1.5}, presence_penalty=-0.5, frequency_penalty=2)
    asked = engine.requests[-1]
    assert asked.logit_bias == {65: -100.0, 66: 1.5}
    assert (asked.presence_penalty, asked.frequency_penalty, asked.json_schema) == (-0.5, 2.0, None)
    ask(client, "echo a", response_format={"type": "json_object"})
    assert json.loads(engine.requests[-1].json_schema) == {"type": "object"}
    schema = {"type": "object", "properties": {"é": {"type": "integer"}}, "required": ["é"]}
    ask(
        client,
        "echo a",
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}},
    )
    assert json.loads(engine.requests[-1].json_schema) == schema


def test_several_choices(client):
    completion = ask(client, "echo abc", n=3)
    assert [(c.index, c.message.content) for c in completion.choices] == [(i, "abc") for i in range(3)]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 12)  # the prompt counts once
    last = list(ask(client, "echo abc", n=3, stream=True, stream_options={"include_usage": True}))[-1]
    assert last.usage == completion.usage
    assert len(completion.model_extra["cogumi"]["choices"]) == 3
    texts = {}
    for chunk in ask(client, "echo abc", n=3, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    assert texts == dict.fromkeys(range(3), "abc")


def test_logprobs(client):
    content = ask(client, "echo ab", logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [entry.token for entry in content] == ["a", "b"]
    assert content[0].bytes == [97]
    assert [(t.token, t.logprob) for t in content[0].top_logprobs] == [("a", -0.5), ("b", -1.5)]
    assert ask(client, "echo ab", logprobs=True).choices[0].logprobs.content[0].top_logprobs == []
    streamed = [
        entry.token
        for chunk in ask(client, "echo ab", logprobs=True, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == ["a", "b"]


def test_stream(client):
    chunks = list(ask(client, "echo abc", stream=True, stream_options={"include_usage": True}))
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "abc"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-2].model_extra["cogumi"]["tier"] == "base"
    assert all(c.usage is None for c in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 14)


def test_bytes_of_a_stream(port, engine):
    body = json.dumps({"model": "cogumi", "stream": True, "messages": [{"role": "user", "content": "think a"}]})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        data = response.readline()  # nothing is answered before the whole body has arrived
        engine.thought.set()
        data += response.read()
    assert response.status == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = data.decode().split("\n\n")
    assert blocks[0] == ": keep-alive"
    assert blocks[-2:] == ["data: [DONE]", ""]
    for block in blocks[:-2]:
        assert block == ": keep-alive" or json.loads(block.removeprefix("data: "))["choices"]
        assert "usage" not in block or "usage" in json.loads(block.removeprefix("data: "))["cogumi"]


@pytest.mark.parametrize(
    ("question", "streamed"),
    [("note abc", "abc\n\n(not sure)"), ("held abc", "abc"), ("swap abc", "abc\n\nanother"), ("echo ", "")],
)
def test_stream_when_the_text_is_revised(client, question, streamed):
    chunks = list(ask(client, question, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == streamed
    assert chunks[0].choices[0].delta.role == "assistant"


def test_errors_before_the_first_byte_set_the_http_status(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, "long", stream=stream)
        assert refused.value.code == "context_length_exceeded"
        assert "512" in refused.value.message
        assert refused.value.response.headers["x-should-retry"] == "false"
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, "busy", stream=stream)
        assert refused.value.response.headers["retry-after"] == "1"
        assert "x-should-retry" not in refused.value.response.headers
        with pytest.raises(openai.NotFoundError) as refused:
            ask(client, "echo", model="gpt-4o", stream=stream)
        assert refused.value.code == "model_not_found"
        assert "cogumi:fast" in refused.value.message
        with pytest.raises(openai.BadRequestError, match="no modifier"):
            ask(client, "echo", stream=stream, extra_body={"cogumi": {"modifier": "nope"}})
        with pytest.raises(openai.InternalServerError) as refused:
            ask(client, "break", stream=stream)
        assert "internal error" in refused.value.message
        assert "a defect" not in refused.value.message
        assert refused.value.response.headers["x-request-id"]


def test_error_after_the_first_byte_is_sent_as_an_event(client, port):
    with pytest.raises(openai.APIError, match="context is full"):
        list(ask(client, "late abc", stream=True))
    body = json.dumps({"model": "cogumi", "stream": True, "messages": [{"role": "user", "content": "late a"}]})
    assert raw(port, "POST", "/v1/chat/completions", body)[2].endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "text",
        ),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "schema"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"one": 1}}, "logit_bias"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": "much"}, "presence_penalty"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"cogumi": {"mood": "good"}}, "mood"),
    ],
)
def test_bad_requests_name_the_key(port, change, named):
    body = {"model": "cogumi", "messages": [{"role": "user", "content": "echo"}]} | change
    status, headers, data = raw(port, "POST", "/v1/chat/completions", json.dumps(body))
    assert status == 400
    assert headers["x-should-retry"] == "false"
    error = json.loads(data)["error"]
    assert named in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/chat/completions", b'{"model": "cogumi", ', 400),
        ("POST", "/v1/chat/completions", b"\xff\xfe", 400),
        ("POST", "/v1/chat/completions", b"[]", 400),
        ("POST", "/v1/chat/completions", b"", 400),
        ("POST", "/v1/chat/completions", b'{"a":"' + b"x" * 30_000 + b'"}', 413),
        ("POST", "/v1/chat/completions", b"[" * 15_000, 400),
        ("GET", "/v1/chat/completions", None, 405),
        ("GET", "/v1/nothing", None, 404),
        ("DELETE", "/v1/models", None, 405),
    ],
)
def test_every_error_has_the_same_shape(port, method, path, body, status):
    answered, headers, data = raw(port, method, path, body)
    assert answered == status
    assert set(json.loads(data)["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"].startswith("req_")
    assert headers["x-should-retry"] == "false"


@settings(max_examples=40, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    ),
    st.sampled_from(["messages", "stop", "n", "seed", "stream_options", "tools", "cogumi", "user", "logit_bias"]),
)
def test_any_body_gets_a_valid_response(port, value, key):
    body = {"model": "cogumi", "messages": [{"role": "user", "content": "echo a"}], key: value}
    status, _, data = raw(port, "POST", "/v1/chat/completions", json.dumps(body))
    assert status in (200, 400)
    assert ("error" in json.loads(data)) == (status == 400)


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("ours", "reason"),
    [
        ({"examples": []}, "cogumi.examples: .*at least 1"),
        ({"examples": [GOOD] * 11}, "cogumi.examples: .*at most 10"),
        ({"examples": [{"question": "q"}]}, r"cogumi\.examples\.0\.answer: Field required"),
        ({"examples": [{"question": 5, "answer": "a"}]}, r"cogumi\.examples\.0\.question: .*valid string"),
        ({"examples": [GOOD, {"question": "", "answer": "a"}]}, r"cogumi\.examples\.1\.question: .*at least 1"),
        ({"examples": [GOOD | {"more": 1}]}, "Extra inputs"),
        ({"examples": "q"}, "valid list"),
        ({"examples": [GOOD], "adapt": "maybe"}, "cogumi.adapt: .*valid boolean"),
    ],
)
def test_invalid_examples_are_refused_in_one_line(port, ours, reason):
    body = {"model": "cogumi", "messages": [{"role": "user", "content": "echo a"}], "cogumi": ours}
    status, _, data = raw(port, "POST", "/v1/chat/completions", json.dumps(body))
    assert status == 400
    message = json.loads(data)["error"]["message"]
    assert re.search(reason, message)
    assert "\n" not in message


def test_lone_surrogate_in_a_message_is_refused(port):
    body = '{"model": "cogumi", "messages": [{"role": "user", "content": "echo \\ud800"}]}'
    assert raw(port, "POST", "/v1/chat/completions", body)[0] == 400


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_frees_its_slot(port, engine, stream):
    body = {"model": "cogumi", "stream": stream, "messages": [{"role": "user", "content": "slow"}]}
    send_and_hang_up(port, body, lambda: engine.running == 1)
    until(lambda: engine.running == 0)  # the scripted answer never ends by itself


class Stuck:
    """Events of a request that waits for a slot, as an iterator instead of a generator."""

    def __init__(self):
        self.asked, self.over = threading.Event(), threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        self.asked.set()
        self.over.wait(2 * PATIENCE)
        raise StopIteration

    def close(self):
        self.over.set()


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_disconnects_while_waiting_is_cancelled(port, engine, monkeypatch, stream):
    stuck = Stuck()
    monkeypatch.setattr(engine, "generate", lambda request: stuck)
    body = {"model": "cogumi", "stream": stream, "messages": [{"role": "user", "content": "x"}]}
    send_and_hang_up(port, body, stuck.asked.is_set)
    assert stuck.over.wait(PATIENCE)


def test_health_while_loading_and_after_a_failed_load():
    go, failures = threading.Event(), []

    def load():
        go.wait(PATIENCE)
        raise CogumiError("no bundle.json in x; build one with: cogumi build")

    with running(load, on_failure=failures.append) as port:
        assert raw(port, "GET", "/health")[0] == 200
        for method, path in (("GET", "/ready"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")):
            body = json.dumps({"model": "cogumi", "messages": [{"role": "user", "content": "x"}]})
            status, headers, data = raw(port, method, path, body if method == "POST" else None)
            assert (status, headers["retry-after"]) == (503, "1")
            assert "loading" in json.loads(data)["error"]["message"]
        go.set()
        until(lambda: failures)
        status, headers, data = raw(port, "GET", "/ready")
        assert (status, headers["x-should-retry"]) == (503, "false")
        assert "no bundle.json" in json.loads(data)["error"]["message"]


def test_port_in_use_is_reported_in_one_line():
    with contextlib.closing(bind("127.0.0.1", 0)) as taken, pytest.raises(CogumiError, match="--port"):
        bind("127.0.0.1", taken.getsockname()[1])
