"""llama.cpp as a whole: what it logs and complains about, and the one thread that its parallel work runs in."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from llama_cpp import llama_cpp as c

from cogumi.core.errors import RequestError

T = TypeVar("T")

_ERROR_LEVEL = 4  # ggml.h
complaints: list[str] = []
"""What llama.cpp has complained about since somebody cleared the list."""
_listeners: list[list[str]] = []


@c.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _user_data: Any) -> None:
    said = text.decode("utf-8", "replace")
    if level == _ERROR_LEVEL and said.strip():
        complaints.append(said.strip())
    for listener in _listeners:
        listener.append(said)


c.llama_log_set(_keep, ctypes.c_void_p(0))
c.llama_backend_init()


@contextmanager
def listening() -> Iterator[list[str]]:
    """Everything llama.cpp logs meanwhile; a line may come in several pieces."""
    heard: list[str] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners[:] = [listener for listener in _listeners if listener is not heard]


def reason() -> str:
    """llama.cpp's first complaint since the last clearing: later ones only say that the caller failed too."""
    return complaints[0] if complaints else "llama.cpp gave no reason"


_compute = ThreadPoolExecutor(1, thread_name_prefix="llama")


def computed(threads: int, work: Callable[[], T]) -> T:
    """Run llama.cpp's parallel work, always in the same thread of this process.

    OpenMP keeps a team of threads for each thread that ever called it, and lets all of them doze at every barrier
    once their sum exceeds the processors: measured on two cores, 42 instead of 33 ms a token. Two models computing
    at a time would be slower still.
    """
    return work() if threads == 1 else _compute.submit(work).result()


def utf8(text: str) -> bytes:
    """The bytes of a text; `RequestError` for half of a surrogate pair."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("the text holds half of a surrogate pair; send whole characters") from error
