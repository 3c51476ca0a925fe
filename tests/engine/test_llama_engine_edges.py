"""The llama engine around its answers: echo, failures, adapters, cache types, what is freed (SPEC E1, E7, E8)."""

import gc
import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from cogumi.core.errors import BundleError, BusyError, RequestError
from cogumi.core.types import Request
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from support.engines import CHAT, ask, ids, opened, pico, plain
from support.waiting import PATIENCE, Gate, until


@pytest.fixture(scope="module")
def engine():
    with closing(opened()) as engine:
        yield engine


def test_echo_is_what_reading_says(engine):
    for n in (1, 2, 70, 400):
        prompt = ids(n, 8)
        reply = ask(engine, Request(prompt=prompt, max_tokens=3, echo=True, logprobs=2))
        assert [token.id for token in reply.prompt] == list(prompt[1:])
        surprise = engine.read(Request(prompt=prompt)).surprise
        assert [-token.logprob for token in reply.prompt] == pytest.approx(list(surprise), abs=1e-4)
        assert all(len(token.top) == 2 for token in reply.prompt)
        assert plain(reply) == plain(ask(engine, Request(prompt=prompt, max_tokens=3, logprobs=2)))
    text = "naïve 日本語 🙂"
    reply = ask(engine, Request(prompt="x" + text, max_tokens=1, echo=True))
    assert "".join(token.text for token in reply.prompt) == text


def test_a_failing_batch_takes_only_its_own_jobs_with_it(monkeypatch):
    engine = LlamaEngine(pico().base_q8, threads=1, adapters={"a": pico().adapter_gguf}, lookup=False)
    request = Request(prompt=ids(20, 12), max_tokens=100)
    whole, adapted = ask(engine, request), ask(engine, replace(request, adapter="a"))
    decode = Context.decode

    def failing(self, rows):
        if any(4 in row.tokens for row in rows):  # in no other prompt: `ids` begin at 5
            raise RequestError("llama.cpp could not run a batch")
        return decode(self, rows)

    monkeypatch.setattr(Context, "decode", failing)
    other = engine.generate(replace(request, adapter="a"))
    with pytest.raises(RequestError, match="could not run"):
        ask(engine, Request(prompt=(4, 7), max_tokens=5))
    assert final_reply(other).tokens == adapted.tokens
    assert ask(engine, request).tokens == whole.tokens
    engine.close()


def test_idle_adapters_are_freed_and_come_back_with_the_same_bits():
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


def test_added_adapters_are_remembered(tmp_path):
    files, file = pico(), tmp_path / "added.json"
    request = Request(prompt=ids(20, 14), max_tokens=15, adapter="late")
    engine = LlamaEngine(files.base_q8, threads=1, adapters={"a": files.adapter_gguf}, remember=file, lookup=False)
    engine.add_adapter("late", files.adapter_gguf)
    told = ask(engine, request).tokens
    engine.add_adapter("late", files.adapter_gguf)  # replaced while idle
    with pytest.raises(BundleError):
        engine.add_adapter("late", files.other_adapter_gguf)
    assert ask(engine, request).tokens == told
    engine.close()
    assert list(json.loads(file.read_text())) == ["late"]
    again = LlamaEngine(files.base_q8, threads=1, remember=file, lookup=False)
    assert again.adapters == ("late",)
    assert ask(again, request).tokens == told
    again.close()
    for text in ("[1]", "{", '{"x": 5}'):
        file.write_text(text)
        with pytest.raises(BundleError, match=r"added\.json"):
            LlamaEngine(files.base_q8, threads=1, remember=file)
    file.write_text(json.dumps({"gone": str(tmp_path / "gone.gguf")}))
    with pytest.raises(BundleError, match="does not exist"):
        LlamaEngine(files.base_q8, threads=1, remember=file)


def test_an_adapter_that_is_answering_is_not_replaced(monkeypatch):
    files, gate = pico(), Gate(monkeypatch)
    engine = LlamaEngine(files.base_q8, threads=1, adapters={"a": files.adapter_gguf}, lookup=False)
    gate.shut()
    stream = engine.generate(Request(prompt=ids(20, 14), max_tokens=400, adapter="a"))
    gate.wait()
    with ThreadPoolExecutor(1) as other:
        added = other.submit(engine.add_adapter, "a", files.adapter_gguf)
        until(lambda: engine._scheduler._calls)  # it runs behind the pass that is held
        gate.open()
        with pytest.raises(RequestError, match="is in use"):
            added.result(PATIENCE)
    stream.close()
    engine.close()


def test_no_adapter_is_the_base_bit_for_bit(engine):
    bare = LlamaEngine(pico().base_q8, threads=1, lookup=False)
    for seed in range(5):
        request = Request(prompt=ids(30, 20 + seed), max_tokens=20, logprobs=3)
        ask(engine, replace(request, adapter="a"))
        assert plain(ask(engine, request)) == plain(ask(bare, request))
    bare.close()


def test_cache_types_differ_in_size_and_hardly_in_what_they_say():
    engines = {
        kind: LlamaEngine(pico().base_q8, threads=1, cache=kind, lookup=False) for kind in ("f16", "q8_0", "q4_0")
    }
    bytes_ = {kind: engine.cache_bytes for kind, engine in engines.items()}
    assert bytes_["q8_0"] / bytes_["f16"] == pytest.approx(34 / 64)
    assert bytes_["q4_0"] / bytes_["f16"] == pytest.approx(18 / 64)
    scores = {kind: engine.score(Request(messages=CHAT), "It is 105.").nats for kind, engine in engines.items()}
    assert scores["f16"] != scores["q8_0"] == pytest.approx(scores["f16"], rel=0.01)
    assert scores["q4_0"] == pytest.approx(scores["f16"], rel=0.1)
    for engine in engines.values():
        engine.close()
    with pytest.raises(BundleError, match="unknown cache type 'q5'"):
        LlamaEngine(pico().base_q8, cache="q5")


@pytest.mark.parametrize("size", [{"slots": 0}, {"context": 0}, {"draft_tokens": -1}])
def test_sizes_that_mean_nothing_are_refused(size):
    with pytest.raises(BundleError, match="at least 1"):
        LlamaEngine(pico().base_q8, **size)


def test_who_is_cancelled_while_waiting_leaves_the_queue(monkeypatch):
    gate = Gate(monkeypatch)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=1, queue=2, lookup=False)
    gate.shut()
    busy = engine.generate(Request(prompt="Tom", max_tokens=400))
    gate.wait()
    first, second = (engine.generate(Request(prompt="Ann", max_tokens=3)) for _ in range(2))
    with pytest.raises(BusyError, match="2 requests are waiting"):
        engine.generate(Request(prompt="Bob"))
    with ThreadPoolExecutor(1) as reader:
        told = reader.submit(first._receive)  # as a reader that came before it was closed
        first.close()
        third = engine.generate(Request(prompt="Bob", max_tokens=3))
        assert told.result(PATIENCE).finish_reason == "cancelled"
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


def test_an_engine_that_is_dropped_closes_by_itself():
    engine = LlamaEngine(pico().base_q8, threads=1, lookup=False)
    thread, weights = engine._scheduler._thread, weakref.ref(engine._model.weights)
    events = engine.generate(Request(prompt="Tom", max_tokens=50))
    del engine
    assert final_reply(events).finish_reason == "length"  # who still reads keeps it open
    assert thread.is_alive()
    del events
    thread.join(PATIENCE)
    assert not thread.is_alive()
    gc.collect()
    assert weights() is None


def test_weights_go_with_their_engine():
    engine = LlamaEngine(pico().base_q8, threads=1)
    ask(engine, Request(prompt="Tom", max_tokens=3))
    weights = weakref.ref(engine._model.weights)
    engine.close()
    del engine
    assert weights() is None
