"""A scripted engine, a server in a thread, and clients cruder than any SDK, for the tests of all that serves."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from types import MappingProxyType

import numpy as np
import openai
import uvicorn

from cogumi.core.errors import BusyError, ContextError, RequestError
from cogumi.core.types import Decision, Reply, Revision, Token, Usage
from cogumi.serve.app import bind, create_app
from support.waiting import PATIENCE, until


class ByteTokenizer:
    size, eos, ends = 257, 256, frozenset({256})
    settings = MappingProxyType({"bos_token": None, "eos_token": "<end>", "chat_template": "{{ messages }}"})

    def piece(self, token):
        return bytes([token]) if token < 256 else b""

    def encode(self, text, special=False):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def render(self, request):
        if request.prompt is None:
            return self.encode("".join(m.content for m in request.messages))
        return self.encode(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)


class Scripted:
    """Does what the last message says: its first word is what happens, the rest what is answered."""

    models = MappingProxyType({"cogumi": "cascade", "cogumi:fast": "mode", "cogumi:base+code": "modifier"})
    takes_feedback = True
    adapters = ("code",)
    context = 512

    def __init__(self):
        self.tokenizer = ByteTokenizer()
        self.requests, self.running, self.most_running, self.closed = [], 0, 0, False
        self.thought = threading.Event()
        """What an answer that begins with "think" waits for."""

    def resolve(self, model, request):
        if request.adapter not in (None, "code"):
            raise RequestError(f"no modifier {request.adapter!r}; there is: code")
        return self, request

    def generate(self, request):
        self.requests.append(request)
        said = (
            request.messages[-1].content if request.messages else self.tokenizer.decode(self.tokenizer.render(request))
        )
        word, _, rest = said.partition(" ")
        if word == "busy":
            raise BusyError("all 8 slots are taken; ask again in a moment")
        if word == "long":
            raise ContextError("the prompt has 600 tokens, the context holds 512; shorten it")
        return self._events(word, rest, request)

    def _events(self, word, rest, request):
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if word == "break":
                raise ZeroDivisionError("a defect")
            if word == "slow":
                while True:  # until it is closed
                    time.sleep(0.02)
                    yield self._token("z")
            if word == "think":
                assert self.thought.wait(PATIENCE)
            decision = Decision("base", "p_correct", 0.9, 0.8, True, "0.90 >= 0.80")
            yield decision
            tokens = tuple(self._token(c, request.logprobs) for c in rest)
            if word != "held":
                yield from tokens
            if word == "late":
                raise ContextError("the context is full")
            text = rest
            if word == "note":
                text = f"{rest}\n\n(not sure)"
                yield Revision(text)
            if word == "swap":
                text = "another"
                yield Revision(text)
            tokens += (Token(256, "", -0.1, 0.0, 1.0),)
            usage = Usage(10, len(tokens), 4, drafted=6, accepted=5)
            seen = self.tokenizer.render(request)[1:] if request.echo else []
            prompt = tuple(self._token(chr(i), request.logprobs) for i in seen)
            yield Reply(text, tokens, "stop", usage, {"length": 3.0}, (decision,), "base", "base", 0.9, prompt)
        finally:
            self.running -= 1

    def _token(self, text, top=0):
        return Token(ord(text), text, -0.5, 0.7, 1.0, None, tuple((97 + i, -0.5 - i) for i in range(top)))

    def embed(self, texts):
        return np.array([[len(text), 0.1] for text in texts], np.float32)

    def close(self):
        self.closed = True


def running(load, **options):
    """Serve an engine on a free port in a thread; yields the port."""
    return serving(create_app(load, **options))


@contextlib.contextmanager
def serving(app, listener=None):
    """Serve an ASGI application in a thread, on a free port or a bound one; yields the port."""
    listener = listener or bind("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


@contextlib.contextmanager
def ready(load, **options):
    """Serve as `running` does; yields the port once the engine is loaded."""
    loaded = threading.Event()
    with running(load, on_ready=lambda _: loaded.set(), **options) as port:
        assert loaded.wait(PATIENCE)
        yield port


def client_of(port, prefix=""):
    """The `openai` package's client of a server on this machine; it asks once."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}{prefix}/v1", api_key="any", max_retries=0, timeout=PATIENCE)


def raw(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    connection.request(method, path, body, headers or {"content-type": "application/json"})
    response = connection.getresponse()
    data = response.read()
    connection.close()
    return response.status, response.headers, data


def send_and_hang_up(port, body, under_way, path="/v1/chat/completions", headers=None):
    """Send a request and close the connection once `under_way()` holds, whatever has come by then."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        until(under_way)
