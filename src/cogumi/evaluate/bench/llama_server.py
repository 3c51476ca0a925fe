"""llama.cpp's server in a child process, as the baseline for concurrent requests.

The package xllamacpp contains the server. Run as a module, this file is the child process: it opens the model, prints
the address, and ends when its standard input is closed.
"""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import psutil

from cogumi.core.errors import RequestError


class LlamaServer:
    """The server with `slots` slots of `context` tokens each; `RequestError` if it is not installed or cannot open."""

    def __init__(self, model: Path, *, slots: int, context: int, threads: int) -> None:
        if find_spec("xllamacpp") is None:
            raise RequestError("llama.cpp's server is missing; install it with: pip install xllamacpp")
        command = [sys.executable, "-m", __name__, str(model), *map(str, (slots, context, threads))]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout
        self._address = self._process.stdout.readline().strip().removeprefix("http://")
        if not self._address:
            self.close()
            raise RequestError(f"llama.cpp's server cannot open {model}; try another file")
        self._pool = ThreadPoolExecutor(slots)

    def complete(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[list[int]]:
        """Greedy answers to all prompts concurrently, each of exactly so many `tokens`, not streamed."""
        return list(self._pool.map(self._ask, prompts, tokens))

    def timed(self, prompt: Sequence[int], tokens: int) -> tuple[float, float]:
        """Seconds to the first token and to the end of a greedy answer of exactly `tokens` ids, streamed."""
        began = time.perf_counter()
        with closing(http.client.HTTPConnection(self._address)) as connection:
            response = self._post(connection, prompt, tokens, stream=True)
            if not response.readline().startswith(b"data:"):
                raise RequestError("llama.cpp's server refused to stream an answer")
            first = time.perf_counter() - began
            response.read()
        return first, time.perf_counter() - began

    def _ask(self, prompt: Sequence[int], tokens: int) -> list[int]:
        with closing(http.client.HTTPConnection(self._address)) as connection:
            found = json.loads(self._post(connection, prompt, tokens, stream=False).read())
        if "tokens" not in found:
            raise RequestError(f"llama.cpp's server refused: {found.get('error', found)}")
        return list(found["tokens"])

    def _post(
        self, connection: http.client.HTTPConnection, prompt: Sequence[int], tokens: int, *, stream: bool
    ) -> http.client.HTTPResponse:
        body = {"prompt": list(prompt), "n_predict": tokens, "ignore_eos": True, "temperature": 0, "top_k": 1}
        text = json.dumps(body | {"return_tokens": True, "stream": stream})
        connection.request("POST", "/completion", text, {"Content-Type": "application/json"})
        return connection.getresponse()

    def processor_seconds(self) -> float:
        """Processor time used by the server so far."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _serve(model: str, slots: int, context: int, threads: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel, params.n_ctx = slots, slots * context
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.cache_ram_mib = 0  # do not keep copies of finished slots
    params.verbosity = 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while sys.stdin.read(1):
        time.sleep(0.1)


if __name__ == "__main__":
    _serve(sys.argv[1], *map(int, sys.argv[2:]))
