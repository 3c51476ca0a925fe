"""OpenAI-compatible servers in separate processes on loopback: `cogumi serve` and llama-cpp-python's server."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request

from support.waiting import PATIENCE, until

CONTEXT = 256
NEUTRAL = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
"""Turns off the sampling filters that llama-cpp-python applies by default."""


@contextlib.contextmanager
def process(command, log):
    """A process that writes to the file `log` and is terminated on exit."""
    with open(log, "w") as out, subprocess.Popen(command, stdout=out, stderr=out) as running:
        try:
            yield running
        finally:
            running.terminate()
            try:
                running.wait(20)
            except subprocess.TimeoutExpired:
                running.kill()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def await_answer(url, running, log):
    """Wait until a GET of `url` succeeds."""

    def answers():
        assert running.poll() is None, log.read_text()[-2000:]
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(url, timeout=PATIENCE):
            return True

    until(answers)


@contextlib.contextmanager
def our_server(bundle, folder):
    """Run `cogumi serve` over a bundle; yields its address."""
    port, log = free_port(), folder / "cogumi.log"
    words = [bundle, "--port", port, "--context", CONTEXT, "--threads", 1]
    with process([sys.executable, "-m", "cogumi", "serve", *map(str, words)], log) as running:
        await_answer(f"http://127.0.0.1:{port}/ready", running, log)
        yield f"http://127.0.0.1:{port}/v1"


@contextlib.contextmanager
def llama_cpp_server(model, adapter, folder):
    """llama-cpp-python's server over a model, as `base`, and over the same with an adapter, as `base+a`."""
    port, log, settings = free_port(), folder / "llama_cpp.log", folder / "llama_cpp.json"
    common = {"model": str(model), "n_ctx": CONTEXT, "n_threads": 1, "n_threads_batch": 1, "logits_all": True}
    common |= {"verbose": False, "chat_format": None}
    models = [common | {"model_alias": "base"}, common | {"model_alias": "base+a", "lora_path": str(adapter)}]
    settings.write_text(json.dumps({"host": "127.0.0.1", "port": port, "interrupt_requests": False, "models": models}))
    command = [sys.executable, "-m", "llama_cpp.server", "--config_file", str(settings)]
    with process(command, log) as running:
        await_answer(f"http://127.0.0.1:{port}/v1/models", running, log)
        yield f"http://127.0.0.1:{port}/v1"
