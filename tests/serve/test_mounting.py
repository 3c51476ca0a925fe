"""The server as an ASGI application: with applications mounted on it, and mounted in another one."""

import contextlib
import json
import threading

import pytest
from fastapi import FastAPI, Request
from starlette.responses import PlainTextResponse

from cogumi.core.errors import CogumiError
from cogumi.serve.app import create_app
from support.serve import Scripted, client_of, raw, send_and_hang_up, serving
from support.waiting import PATIENCE, until

CHAT = {"model": "cogumi", "messages": [{"role": "user", "content": "echo abc"}]}


async def page(scope, receive, send):
    """A plain ASGI application: the size of the body, or a failure at /fail."""
    if scope["path"].endswith("/fail"):
        raise ZeroDivisionError("a defect of the page")
    size = len(await Request(scope, receive).body())
    await PlainTextResponse(f"{size} bytes at {scope['root_path']}")(scope, receive, send)


def client_at(port, prefix=""):
    return client_of(port, prefix)


def until_ready(port, prefix=""):
    until(lambda: raw(port, "GET", f"{prefix}/ready")[0] == 200)


def check_every_route(port, prefix=""):
    """Health, models, chat (whole and streamed), completions, embeddings, tokenizer, documentation."""
    assert raw(port, "GET", f"{prefix}/health")[0] == 200
    client = client_at(port, prefix)
    assert [model.id for model in client.models.list()] == list(Scripted.models)
    assert client.models.retrieve("cogumi:base+code").id == "cogumi:base+code"
    assert client.chat.completions.create(**CHAT).choices[0].message.content == "abc"
    streamed = client.chat.completions.create(**CHAT, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "abc"
    assert client.completions.create(model="cogumi", prompt="echo ab").choices[0].text == "ab"
    assert client.embeddings.create(model="cogumi", input="ab").data[0].embedding[0] == 2
    assert raw(port, "POST", f"{prefix}/tokenize", '{"prompt": "a"}')[0] == 200
    assert raw(port, "GET", f"{prefix}/docs")[2].count(f"{prefix}/openapi.json".encode()) == 1
    described = json.loads(raw(port, "GET", f"{prefix}/openapi.json")[2])
    assert "/v1/chat/completions" in described["paths"]
    assert described.get("servers") == ([{"url": prefix}] if prefix else None)


def test_application_can_be_mounted_on_the_server():
    engine = Scripted()
    app = create_app(lambda: engine, max_body_bytes=20_000)
    app.mount("/ui", page)
    with serving(app) as port:
        until_ready(port)
        check_every_route(port)
        status, headers, data = raw(port, "POST", "/ui/x", b"12345")
        assert (status, data) == (200, b"5 bytes at /ui")
        assert headers["x-request-id"].startswith("req_")
        assert raw(port, "POST", "/ui/x", b"x" * 30_000)[0] == 413
        status, headers, data = raw(port, "GET", "/ui/fail")
        assert status == 500
        assert json.loads(data)["error"]["code"] == "internal_error"
        assert headers["x-request-id"].startswith("req_")
    assert engine.closed


def test_server_can_be_mounted_under_a_prefix():
    """The outer application does not forward the lifespan: the first request loads, the end of the loop closes."""
    engine, loads = Scripted(), []
    outer = FastAPI()
    outer.mount("/llm", create_app(lambda: loads.append(1) or engine, max_body_bytes=20_000))
    outer.mount("/page", page)
    with serving(outer) as port:
        assert raw(port, "GET", "/llm/health")[0] == 200
        assert loads == []
        status, headers, data = raw(port, "GET", "/llm/ready")
        assert (status, headers["retry-after"]) == (503, "1")
        assert "loading" in json.loads(data)["error"]["message"]
        until_ready(port, "/llm")
        check_every_route(port, "/llm")
        assert raw(port, "GET", "/llm/health")[1]["x-request-id"].startswith("req_")
        assert raw(port, "GET", "/page/x")[1]["x-request-id"] is None
        assert not engine.closed
    assert loads == [1]
    assert engine.closed


def test_outer_lifespan_can_load_before_the_first_request():
    engine, ready = Scripted(), threading.Event()
    inner = create_app(lambda: engine, on_ready=lambda _: ready.set())

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with inner.router.lifespan_context(inner):
            yield

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/llm", inner)
    with serving(outer) as port:
        assert ready.wait(PATIENCE)
        assert client_at(port, "/llm").chat.completions.create(**CHAT).choices[0].message.content == "abc"
    assert engine.closed


def test_server_mounted_twice_loads_once():
    engines, ready = [], threading.Event()

    def load():
        engines.append(Scripted())
        return engines[-1]

    inner = create_app(load, on_ready=lambda _: ready.set())

    @contextlib.asynccontextmanager
    async def lifespan(_):
        async with inner.router.lifespan_context(inner), inner.router.lifespan_context(inner):
            yield

    outer = FastAPI(lifespan=lifespan)
    outer.mount("/a", inner)
    outer.mount("/b", inner)
    with serving(outer) as port:
        assert ready.wait(PATIENCE)
        check_every_route(port, "/a")
        check_every_route(port, "/b")
    assert [engine.closed for engine in engines] == [True]


def test_nested_servers_give_one_request_id():
    engines = [Scripted(), Scripted()]
    outer = create_app(lambda: engines[0])
    outer.mount("/inner", create_app(lambda: engines[1]))
    with serving(outer) as port:
        until_ready(port)
        until_ready(port, "/inner")
        check_every_route(port, "/inner")
        assert raw(port, "GET", "/inner/health")[1].get_all("x-request-id")[1:] == []
    assert [engine.closed for engine in engines] == [True, True]
    assert engines[0].requests == []


def test_outer_request_id_is_kept():
    outer = FastAPI()
    outer.mount("/llm", create_app(Scripted))

    @outer.middleware("http")
    async def identify(request, forward):
        request.state.request_id = "outer-7"
        return await forward(request)

    with serving(outer) as port:
        assert raw(port, "GET", "/llm/health")[1].get_all("x-request-id") == ["outer-7"]


def test_application_can_be_started_again():
    engines = []
    app = create_app(lambda: engines.append(Scripted()) or engines[-1])
    for run in range(2):
        with serving(app) as port:
            until_ready(port)
            assert client_at(port).chat.completions.create(**CHAT).choices[0].message.content == "abc"
        assert [engine.closed for engine in engines] == [True] * (run + 1)


def test_errors_under_a_prefix_have_openais_shape():
    outer = FastAPI()
    outer.mount("/llm", create_app(Scripted, max_body_bytes=1_000))
    with serving(outer) as port:
        until_ready(port, "/llm")
        large = json.dumps(CHAT | {"user": "x" * 2_000})
        for method, path, body, status, said in (
            ("POST", "/llm/v1/chat/completions", large, 413, "larger than 1000 bytes"),
            ("POST", "/llm/v1/chat/completions", "{", 400, "not valid JSON"),
            ("GET", "/llm/v1/nothing", None, 404, "/llm/v1/nothing"),
            ("POST", "/llm/v1/chat/completions", json.dumps(CHAT | {"model": "no"}), 404, "cogumi:fast"),
        ):
            answered, headers, data = raw(port, method, path, body)
            assert answered == status
            assert said in json.loads(data)["error"]["message"]
            assert headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_under_a_prefix_frees_the_slot(stream):
    engine, outer = Scripted(), FastAPI()
    outer.mount("/llm", create_app(lambda: engine))
    with serving(outer) as port:
        until_ready(port, "/llm")
        body = CHAT | {"stream": stream, "messages": [{"role": "user", "content": "slow"}]}
        send_and_hang_up(port, body, lambda: engine.running == 1, "/llm/v1/chat/completions")
        until(lambda: engine.running == 0)


def test_mounted_server_reports_a_failed_load():
    def load():
        raise CogumiError("no bundle.json in x; build one with: cogumi build")

    outer = FastAPI()
    outer.mount("/llm", create_app(load))
    with serving(outer) as port:
        until(lambda: b"no bundle.json" in raw(port, "GET", "/llm/ready")[2])
        assert raw(port, "GET", "/llm/health")[0] == 200


def test_internal_error_has_a_request_id():
    class Broken(Scripted):
        def embed(self, texts):
            raise ZeroDivisionError("a defect")

    with serving(create_app(Broken)) as port:
        until_ready(port)
        status, headers, data = raw(port, "POST", "/v1/embeddings", '{"model": "cogumi", "input": "a"}')
        assert (status, json.loads(data)["error"]["code"]) == (500, "internal_error")
        assert headers.get_all("x-request-id")[1:] == []
        assert headers["x-request-id"].startswith("req_")
