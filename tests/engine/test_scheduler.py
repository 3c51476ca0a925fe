"""The scheduler (SPEC E1): waiting, cancellation, a full queue, and isolation of failures."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from cogumi.core.errors import BusyError, RequestError
from cogumi.core.types import Request, Token
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from support.engines import ask, ids, pico
from support.waiting import PATIENCE, Gate


def test_failing_batch_fails_only_its_own_jobs(monkeypatch):
    engine = LlamaEngine(pico().base_q8, threads=1, adapters={"a": pico().adapter_gguf}, lookup=False)
    request = Request(prompt=ids(20, 12), max_tokens=100)
    whole, adapted = ask(engine, request), ask(engine, replace(request, adapter="a"))
    decode = Context.decode

    def failing(self, rows, **options):
        if any(4 in row.tokens for row in rows):  # in no other prompt, because `ids` begin at 5
            raise RequestError("llama.cpp could not run a batch")
        return decode(self, rows, **options)

    monkeypatch.setattr(Context, "decode", failing)
    other = engine.generate(replace(request, adapter="a"))
    with pytest.raises(RequestError, match="could not run"):
        ask(engine, Request(prompt=(4, 7), max_tokens=5))
    assert final_reply(other).tokens == adapted.tokens
    assert ask(engine, request).tokens == whole.tokens
    engine.close()


def test_job_cancelled_while_waiting_leaves_the_queue(monkeypatch):
    gate = Gate(monkeypatch)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=1, queue=2, lookup=False)
    gate.shut()
    busy = engine.generate(Request(prompt="Tom", max_tokens=400))
    gate.wait()
    first, second = (engine.generate(Request(prompt="Ann", max_tokens=3)) for _ in range(2))
    with pytest.raises(BusyError, match="2 requests are waiting"):
        engine.generate(Request(prompt="Bob"))
    with ThreadPoolExecutor(1) as reader:
        cancelled = reader.submit(first._receive)  # like a reader that started before the close
        first.close()
        third = engine.generate(Request(prompt="Bob", max_tokens=3))
        assert cancelled.result(PATIENCE).finish_reason == "cancelled"
    assert list(first) == []
    with pytest.raises(BusyError):
        engine.prefill("s", "Tom")
    second.close()
    ahead = engine.prefill("s", "Tom is")
    engine.prefill("s", "Tom is taller")
    assert ahead.result(PATIENCE) == 0
    busy.close()
    gate.open()
    assert final_reply(third).finish_reason == "length"
    engine.close()


def test_full_queue_raises_a_busy_error(monkeypatch):
    gate, request = Gate(monkeypatch), Request(prompt="Tom", max_tokens=400)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=1, queue=2)
    gate.shut()
    streams = [engine.generate(request)]
    gate.wait()  # it has left the queue
    streams += [engine.generate(request) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests are waiting already; try again"):
        engine.generate(request)
    engine._scheduler.stop()  # before the end of the first pass
    gate.open()
    engine.close()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 3
    with pytest.raises(RequestError, match="closed"):
        engine.generate(Request(prompt="Tom"))
    engine.close()


def test_broken_engine_fails_all_jobs_without_hanging(monkeypatch):
    gate = Gate(monkeypatch)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=2)
    gate.shut(after=3)
    first = engine.generate(Request(prompt="Tom", max_tokens=400))
    assert isinstance(next(first), Token)
    waiting = [engine.generate(Request(prompt="Tom", max_tokens=400)) for _ in range(5)]
    gate.wait()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def broken(self, rows, **options):
        raise SystemExit("no more")

    monkeypatch.setattr(Context, "decode", broken)
    gate.open()
    for stream in [first, *waiting]:
        with pytest.raises(RequestError, match=r"stopped \(no more\)"):
            final_reply(stream)
    with pytest.raises(RequestError, match="stopped"):
        engine.generate(Request(prompt="Tom"))
    engine.close()
