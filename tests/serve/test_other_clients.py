"""What clients of other servers send: sampling parameters of vLLM and llama.cpp, paths, origins, hosts, many texts."""

import json
import threading

import numpy as np
import openai
import pytest

from cogumi.serve import http_routes
from cogumi.serve.choices import AT_ONCE
from cogumi.serve.embeddings import TOKENS, parts
from support.serve import Scripted, client_of, raw, ready, send_and_hang_up
from support.waiting import PATIENCE, until

MESSAGES = [{"role": "user", "content": "echo a"}]


def ask(client, **extra):
    return client.chat.completions.create(model="cogumi", messages=MESSAGES, extra_body=extra)


def test_sampling_parameters_of_other_servers_reach_the_engine(client, engine):
    ask(client, top_k=5, min_p=0.1, repetition_penalty=1.2, min_tokens=3)
    asked = engine.requests[-1]
    assert (asked.top_k, asked.min_p, asked.repetition_penalty, asked.min_tokens) == (5, 0.1, 1.2, 3)
    ask(client, repeat_penalty=1.3, top_k=-1, seed=-1, max_tokens=-1, ignore_eos=True)
    asked = engine.requests[-1]
    assert (asked.repetition_penalty, asked.top_k, asked.seed, asked.max_tokens) == (1.3, 0, None, None)
    assert asked.min_tokens > 10**9
    client.completions.create(model="cogumi", prompt="echo a", max_tokens=-1, extra_body={"top_k": 2})
    assert (engine.requests[-1].max_tokens, engine.requests[-1].top_k) == (None, 2)


@pytest.mark.parametrize(
    "extra",
    [
        {"guided_json": {"type": "integer"}},
        {"guided_json": '{"type": "integer"}'},
        {"response_format": {"type": "json_object", "schema": {"type": "integer"}}},
    ],
)
def test_schemas_of_other_servers_are_enforced(client, engine, extra):
    ask(client, **extra)
    assert json.loads(engine.requests[-1].json_schema) == {"type": "integer"}
    if "guided_json" in extra:
        client.completions.create(model="cogumi", prompt="echo a", extra_body=extra)
        assert json.loads(engine.requests[-1].json_schema) == {"type": "integer"}


def test_keys_without_effect_are_named(client):
    extra = {"chat_template_kwargs": {"enable_thinking": False}, "nobody_knows_this": 1, "tools": [], "other": None}
    answer = client.chat.completions.create(
        model="cogumi", messages=MESSAGES, store=True, metadata={"a": "b"}, extra_body=extra
    )
    named = ["chat_template_kwargs", "metadata", "nobody_knows_this", "store"]
    assert answer.model_extra["cogumi"]["ignored"] == named
    assert "ignored" not in ask(client, top_k=1).model_extra["cogumi"]
    chunks = client.chat.completions.create(model="cogumi", messages=MESSAGES, stream=True, store=True)
    assert list(chunks)[-1].model_extra["cogumi"]["ignored"] == ["store"]
    answer = client.completions.create(model="cogumi", prompt="echo a", extra_body={"mirostat": 2})
    assert answer.model_extra["cogumi"]["ignored"] == ["mirostat"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("guided_regex", "a+"),
        ("guided_choice", ["a", "b"]),
        ("structured_outputs", {"regex": "a"}),
        ("grammar", 'root ::= "a"'),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
        ("seed", -2),
        ("max_tokens", -2),
        ("top_k", 1.5),
        ("min_p", 2),
        ("repetition_penalty", 0),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(client, key, value):
    with pytest.raises(openai.BadRequestError, match=key):
        ask(client, **{key: value})


def test_two_schemas_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="guided_json and response_format"):
        ask(client, guided_json={}, response_format={"type": "json_object"})


@pytest.mark.parametrize("path", ["//v1/models", "/v1//models", "/v1/models/", "//v1//models//"])
def test_paths_are_read_in_every_spelling(port, path):
    assert raw(port, "GET", path)[0] == 200
    body = json.dumps({"model": "cogumi", "messages": MESSAGES})
    assert raw(port, "POST", path.replace("models", "chat/completions"), body)[0] == 200
    assert raw(port, "GET", path.replace("models", "model"))[0] == 404


def test_models_name_their_context(client):
    assert all(model.model_extra["max_model_len"] == Scripted.context for model in client.models.list())


def test_foreign_hosts_are_refused():
    with ready(Scripted, hosts=["localhost", "127.0.0.1", "[::1]"]) as port:
        for name, status in (("LOCALHOST:9", 200), ("[::1]:80", 200), ("127.0.0.1", 200), ("rebound.example:80", 403)):
            found, _, data = raw(port, "GET", "/v1/models", headers={"host": name})
            assert found == status
        assert json.loads(data)["error"]["code"] == "host_not_allowed"
        assert "--allow-host rebound.example" in json.loads(data)["error"]["message"]


def test_pages_of_other_origins_read_answers_only_if_allowed(port):
    asked = {"origin": "http://localhost:3000"}
    preflight = asked | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert "access-control-allow-origin" not in raw(port, "GET", "/v1/models", headers=asked)[1]
    with ready(Scripted, origins=["http://localhost:3000"]) as other:
        status, headers, _ = raw(other, "OPTIONS", "/v1/chat/completions", headers=preflight)
        assert (status, headers["access-control-allow-origin"]) == (200, "http://localhost:3000")
        assert "authorization" in headers["access-control-allow-headers"]
        headers = raw(other, "GET", "/v1/models", headers=asked)[1]
        assert "x-request-id" in headers["access-control-expose-headers"]
        refused = raw(other, "GET", "/v1/models", headers={"origin": "http://elsewhere.example"})[1]
        assert "access-control-allow-origin" not in refused


def test_one_call_does_not_fill_the_engine():
    engine = Scripted()
    with ready(lambda: engine) as port:
        many = threading.Thread(
            target=client_of(port).completions.create, kwargs={"model": "cogumi", "prompt": ["think a"] * 40}
        )
        many.start()
        until(lambda: engine.running == AT_ONCE)
        assert ask(client_of(port)).choices[0].message.content == "a"  # 40 prompts wait, and this one does not
        engine.thought.set()
        many.join(PATIENCE)
    assert (len(engine.requests), engine.most_running) == (41, AT_ONCE + 1)


def test_choices_that_wait_are_dropped_with_their_client():
    engine = Scripted()
    with ready(lambda: engine) as port:
        body = {"model": "cogumi", "prompt": ["slow"] * 40}
        send_and_hang_up(port, body, lambda: engine.running == AT_ONCE, path="/v1/completions")
        until(lambda: engine.running == 0)
    assert len(engine.requests) == AT_ONCE


class Counting(Scripted):
    """Embeds one part at a time, each after `go` was set."""

    def __init__(self):
        super().__init__()
        self.embedded, self.go = [], threading.Semaphore(0)

    def embed(self, texts):
        assert self.go.acquire(timeout=PATIENCE)
        self.embedded.append(len(texts))
        return np.zeros((len(texts), 2), np.float32)


def test_embeddings_of_a_client_that_left_end_after_the_part(monkeypatch):
    engine, left, unless = Counting(), threading.Event(), http_routes.unless_disconnected

    async def noticed(request, work):
        found = await unless(request, work)
        if found is None:
            left.set()
        return found

    monkeypatch.setattr(http_routes, "unless_disconnected", noticed)
    with ready(lambda: engine) as port:
        body = {"model": "cogumi", "input": ["x" * TOKENS] * 9}
        engine.go.release()
        send_and_hang_up(port, body, lambda: engine.embedded == [1], path="/v1/embeddings")
        assert left.wait(PATIENCE)
        engine.go.release(20)
        assert raw(port, "POST", "/v1/embeddings", json.dumps({"model": "cogumi", "input": ["a", "b"]}))[0] == 200
    assert len(engine.embedded) <= 3  # the part that ran when the client left, and the second request
    assert engine.embedded[-1] == 2


def test_parts_hold_every_text_once_and_few_tokens():
    for sizes in ([1], [TOKENS, 1], [3 * TOKENS] * 3, [100] * 50, [0] * 7):
        found = list(parts(sizes))
        assert [i for first, last in found for i in range(first, last)] == list(range(len(sizes)))
        assert all(last - first == 1 or sum(sizes[first:last]) <= TOKENS for first, last in found)
