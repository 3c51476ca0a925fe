"""Adapters of a running llama engine (SPEC E8): unloaded and loaded again, added and replaced."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from cogumi.core.errors import BundleError, RequestError
from cogumi.core.types import Reply, Request
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from support.engines import ask, ids, opened, pico, plain
from support.waiting import PATIENCE, Gate, until


@pytest.fixture(scope="module")
def engine():
    with closing(opened()) as engine:
        yield engine


def test_idle_adapters_are_unloaded_and_reloaded_with_the_same_results():
    files = pico()
    adapters = dict.fromkeys("abc", files.adapter_gguf)
    engine = LlamaEngine(files.base_q8, threads=1, adapters=adapters, adapter_memory=1, slots=2, lookup=False)
    assert engine._adapters.loaded == ()
    request = Request(prompt=ids(20, 13), max_tokens=15)
    seen = {name: ask(engine, replace(request, adapter=name)).tokens for name in "abc"}
    assert engine._adapters.loaded == ("c",)
    long = [engine.generate(replace(request, adapter=name, max_tokens=300)) for name in "ab"]
    both = [final_reply(stream).tokens[:15] for stream in long]
    assert both == [seen["a"], seen["b"]] == [seen["c"]] * 2
    assert ask(engine, request).tokens != seen["a"]
    engine.close()


def test_contexts_of_unloaded_adapters_and_of_a_closed_engine_are_freed(monkeypatch):
    freed, close = [], Context.close
    monkeypatch.setattr(Context, "close", lambda context: (freed.append(context), close(context)))
    files = pico()
    adapters = dict.fromkeys("ab", files.adapter_gguf)
    engine = LlamaEngine(files.base_q8, threads=1, adapters=adapters, adapter_memory=1, lookup=False)
    for name in (None, "a", "b"):
        ask(engine, Request(prompt=ids(20, 13), max_tokens=2, adapter=name))
    assert len(freed) == 1  # that of "a"
    engine.close()
    assert len(set(freed)) == len(freed) == 3


def test_adapters_are_added_and_replaced_while_idle():
    files = pico()
    request = Request(prompt=ids(20, 14), max_tokens=15, adapter="late")
    engine = LlamaEngine(files.base_q8, threads=1, adapters={"a": files.adapter_gguf}, lookup=False)
    engine.add_adapter("late", files.adapter_gguf)
    tokens = ask(engine, request).tokens
    engine.add_adapter("late", files.adapter_gguf)
    with pytest.raises(BundleError):
        engine.add_adapter("late", files.other_adapter_gguf)
    assert ask(engine, request).tokens == tokens
    assert engine.adapters == ("a", "late")
    engine.close()


def test_adapter_in_use_is_not_replaced(monkeypatch):
    files, gate = pico(), Gate(monkeypatch)
    engine = LlamaEngine(files.base_q8, threads=1, adapters={"a": files.adapter_gguf}, lookup=False)
    gate.shut()
    stream = engine.generate(Request(prompt=ids(20, 14), max_tokens=400, adapter="a"))
    gate.wait()
    with ThreadPoolExecutor(1) as other:
        added = other.submit(engine.add_adapter, "a", files.adapter_gguf)
        until(lambda: engine._scheduler._calls)  # it is active while the forward pass is held
        gate.open()
        with pytest.raises(RequestError, match="is in use"):
            added.result(PATIENCE)
    stream.close()
    engine.close()


def test_without_an_adapter_answers_are_bit_identical_to_the_base(engine):
    bare = LlamaEngine(pico().base_q8, threads=1, lookup=False)
    for seed in range(5):
        request = Request(prompt=ids(30, 20 + seed), max_tokens=20, logprobs=3)
        ask(engine, replace(request, adapter="a"))
        assert plain(ask(engine, request)) == plain(ask(bare, request))
    bare.close()


def test_adapter_can_be_added_to_a_running_engine():
    files = pico()
    engine = LlamaEngine(files.base_q8, threads=1)
    stream = engine.generate(Request(prompt="Tom", max_tokens=200))
    next(stream)
    before = final_reply(engine.generate(Request(prompt="Tom is", max_tokens=20)))
    engine.add_adapter("late", files.adapter_gguf)
    assert engine.adapters == ("late",)
    adapted = final_reply(engine.generate(Request(prompt="Tom is", max_tokens=20, adapter="late")))
    after = final_reply(engine.generate(Request(prompt="Tom is", max_tokens=20)))
    assert adapted.text != before.text == after.text
    assert isinstance(list(stream)[-1], Reply)
    with pytest.raises(BundleError):
        engine.add_adapter("bad", files.other_adapter_gguf)
    assert final_reply(engine.generate(Request(prompt="Tom is", max_tokens=20))).text == before.text
    engine.close()
