"""Fixtures shared by the engine tests."""

import threading
from contextlib import ExitStack

import pytest

from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.remote import RemoteEngine
from cogumi.engine.torch import TorchEngine
from support.bundle import make_bundle
from support.engines import pico
from support.remote import CONTEXT, NEUTRAL, llama_cpp_server, our_server
from support.serve import Scripted, running
from support.waiting import PATIENCE


@pytest.fixture
def slow():
    """`cogumi serve` over a scripted engine; yields the engine and the server's address."""
    engine, ready = Scripted(), threading.Event()
    with running(lambda: engine, on_ready=lambda _: ready.set()) as port:
        assert ready.wait(PATIENCE)
        yield engine, f"http://127.0.0.1:{port}/v1"


@pytest.fixture(scope="session")
def servers(tmp_path_factory):
    """Yields a function that starts the server of a kind on first use and returns its address and model file."""
    with ExitStack() as running:
        started = {}

        def server(kind):
            if kind not in started:
                folder = tmp_path_factory.mktemp(kind)
                if kind == "served":
                    bundle = make_bundle(folder)
                    started[kind] = running.enter_context(our_server(bundle, folder)), bundle / "base.gguf"
                else:
                    file = pico().base_f32
                    address = llama_cpp_server(file, pico().adapter_gguf, folder)
                    started[kind] = running.enter_context(address), file
            return started[kind]

        yield server


@pytest.fixture(scope="session")
def opened(servers):
    """A function that opens an engine of a kind once; a `fresh` one is opened for a single test."""
    with ExitStack() as open_engines:
        known = {}

        def make(kind):
            files = pico()
            if kind == "torch":
                return TorchEngine(files.base, adapters={"a": files.adapter}, context=CONTEXT)
            if kind == "llama":
                return LlamaEngine(files.base_q8, adapters={"a": files.adapter_gguf}, context=CONTEXT, threads=1)
            url, file = servers(kind)
            names = ("cogumi:base", "cogumi:base+code") if kind == "served" else ("base", "base+a")
            extra = NEUTRAL if kind == "foreign" else None
            return RemoteEngine(url, names[0], tokenizer=file, adapters={"a": names[1]}, extra=extra)

        def engine(kind, fresh=False):
            if fresh or kind not in known:
                made = make(kind)
                open_engines.callback(made.close)
                if fresh:
                    return made
                known[kind] = made
            return known[kind]

        yield engine


@pytest.fixture
def engine(request, opened):
    return opened(request.param)
