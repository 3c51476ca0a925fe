"""Process-wide llama.cpp state: log and error messages, and the single thread for its parallel computation."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from llama_cpp import llama_cpp as c

from cogumi.core.errors import RequestError

T = TypeVar("T")

_ERROR_LEVEL = 4  # ggml.h
errors: list[str] = []
"""llama.cpp's error messages since the list was last cleared."""
_captures: list[list[str]] = []


@c.llama_log_callback  # type: ignore[untyped-decorator]
def _keep(level: int, text: bytes, _user_data: Any) -> None:
    message = text.decode("utf-8", "replace")
    if level == _ERROR_LEVEL and message.strip():
        errors.append(message.strip())
    for capture in _captures:
        capture.append(message)


os.environ.setdefault("GGML_NO_BACKTRACE", "1")  # a failed assertion ends the process with one line, not a hundred
c.llama_log_set(_keep, ctypes.c_void_p(0))
c.llama_backend_init()
AMX = b"AMX_INT8 = 1" in c.llama_print_system_info()
"""Whether llama.cpp multiplies by the matrix unit of this processor."""


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """Collects everything that llama.cpp logs in the meantime; a line may be split into several pieces."""
    messages: list[str] = []
    _captures.append(messages)
    try:
        yield messages
    finally:
        _captures[:] = [capture for capture in _captures if capture is not messages]


def reason() -> str:
    """llama.cpp's first error message since the last clearing: later ones are only consequences."""
    return errors[0] if errors else "llama.cpp gave no reason"


_compute = ThreadPoolExecutor(1, thread_name_prefix="llama")


def compute(threads: int, work: Callable[[], T]) -> T:
    """Run llama.cpp's computation: with several threads always in the same thread of this process, else in the caller's
    thread, unless that is the main thread.

    OpenMP keeps a thread team for each calling thread, and its barriers stop spinning once all teams together exceed
    the processors: measured on two cores, 42 instead of 33 ms a token. Two models computing at the same time would be
    slower still.

    The main thread may run torch. The configuration of AMX tiles belongs to a thread; llama.cpp sets it once for each
    thread, and torch changes it: afterwards llama.cpp would compute wrong numbers there, or end the process.
    """
    if threads == 1 and threading.current_thread() is not threading.main_thread():
        return work()
    return _compute.submit(work).result()


def utf8(text: str) -> bytes:
    """UTF-8 bytes of a text; `RequestError` for a lone surrogate."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError("the text contains a lone surrogate; send whole characters") from error
