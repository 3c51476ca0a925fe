"""The end of a server: a real process with a scripted engine, and a real SIGTERM."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.serve import raw
from support.waiting import PATIENCE

PROGRAM = """
import sys, threading, time
from cogumi.core.types import Reply, Usage
from cogumi.serve.app import bind, serve
from support.serve import Scripted

class Ending(Scripted):
    def _events(self, word, rest, request):
        for _ in range(10**9 if word == "slow" else 20):
            yield self._token("z")
            time.sleep(0.05)
            if self.closed:
                yield Reply("z", (), "cancelled", Usage())
                return
        yield Reply("z", (), "stop", Usage())

listener = bind("127.0.0.1", 0)
serve(Ending, listener, lambda _: print(listener.getsockname()[1], flush=True), grace=float(sys.argv[1]))
"""


@contextlib.contextmanager
def started(grace):
    """A server with so many seconds of grace; yields its process and port."""
    command = [sys.executable, "-c", PROGRAM, str(grace)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    )
    try:
        yield process, int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def streaming(port, word):
    """A stream under way; yields what is left of it."""
    body = json.dumps({"model": "cogumi", "stream": True, "messages": [{"role": "user", "content": word}]})
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)) as connection:
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
        yield response


@pytest.mark.parametrize("whole", [True, False])
def test_stream_ends_whole_within_the_grace_and_with_an_error_after_it(whole):
    with started(PATIENCE if whole else 0.2) as (process, port), streaming(port, "short" if whole else "slow") as rest:
        process.send_signal(signal.SIGTERM)
        lines = rest.read().decode().split("\n\n")
        _, noted = process.communicate(timeout=PATIENCE)
    assert lines[-2:] == ["data: [DONE]", ""]
    last = json.loads(lines[-3].removeprefix("data: "))
    if whole:
        assert last["choices"][0]["finish_reason"] == "stop"
    else:
        assert "shutting down" in last["error"]["message"]
    assert "Traceback" not in noted


def test_new_requests_are_refused_while_running_ones_end():
    with started(PATIENCE) as (process, port), streaming(port, "slow"):
        process.send_signal(signal.SIGTERM)
        body = json.dumps({"model": "cogumi", "messages": [{"role": "user", "content": "short"}]})
        status = 200
        while status == 200:
            status, headers, data = raw(port, "POST", "/v1/chat/completions", body)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "shutting down" in json.loads(data)["error"]["message"]
        assert raw(port, "GET", "/health")[0] == 200
