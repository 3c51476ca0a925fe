"""The llama engine on real files (SPEC E1, E2, E7): exactness, speculation, echo, latency and release of memory."""

import gc
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from cogumi.core.errors import BundleError
from cogumi.core.types import Request
from cogumi.engine.llama import adapter_context
from cogumi.engine.llama import engine as engine_module
from cogumi.engine.llama.binding.greedy import greedy_loop
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.llama.speculative.latency_model import LatencyCurve
from cogumi.engine.protocol import final_reply, replies
from support.engines import CHAT, ask, ids, pico, plain
from support.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def model():
    return Model(pico().base_q8)


@pytest.fixture(scope="module")
def engine():
    files = pico()
    opened = LlamaEngine(
        files.base_q8, threads=1, draft=files.draft_q8, lookup=False, adapters={"a": files.adapter_gguf}, slots=8
    )
    yield opened
    opened.close()


def prompts(n, longest=120):
    generator = np.random.default_rng(7)
    return [tuple(generator.integers(5, 512, generator.integers(1, longest)).tolist()) for _ in range(n)]


def test_missing_or_mismatched_files_are_refused(tmp_path):
    files = pico()
    with pytest.raises(BundleError, match="does not exist"):
        Model(tmp_path / "none.gguf")
    with pytest.raises(BundleError, match="is not an adapter for"):
        LlamaEngine(files.base_q8, threads=1, adapters={"x": files.other_adapter_gguf})
    with pytest.raises(BundleError, match=r"adapter .* does not exist"):
        LlamaEngine(files.base_q8, threads=1, adapters={"x": tmp_path / "none.gguf"})


def test_concurrent_requests_do_not_change_results(engine):
    """Greedy tokens and signals equal those among concurrent adapters, drafts, lengths and cancellations."""
    requests = [
        Request(
            prompt=prompt,
            max_tokens=3 + 5 * (i % 7),
            adapter="a" if i % 3 == 0 else None,
            speculate=i % 2 == 0,
            logprobs=i % 4,
        )
        for i, prompt in enumerate(prompts(40))
    ]
    alone = [final_reply(engine.generate(request)) for request in requests]
    streams = [engine.generate(request) for request in requests for _ in range(2)]
    for stream in streams[1::2]:
        stream.close()
    for reply, stream in zip(alone, streams[::2], strict=True):
        crowd = final_reply(stream)
        assert crowd.text == reply.text
        assert crowd.tokens == reply.tokens
        assert crowd.usage.completion_tokens == reply.usage.completion_tokens
        assert crowd.usage.accepted == reply.usage.accepted
    assert_idle(engine)


def assert_idle(engine):
    until(lambda: engine.free_slots == 8)


@pytest.mark.parametrize("adapter", [None, "a"])
def test_greedy_speculation_equals_plain_greedy(engine, adapter):
    drafted = accepted = 0
    for prompt in prompts(25):
        plain = Request(prompt=prompt, max_tokens=24, adapter=adapter, speculate=False)
        one, two = (final_reply(engine.generate(replace(plain, speculate=x))) for x in (False, True))
        strip = [replace(token, draft_agreed=None) for token in two.tokens]
        assert (list(one.tokens), one.text, one.finish_reason) == (strip, two.text, two.finish_reason)
        assert one.usage.drafted == 0 < two.usage.drafted
        agreed = [token.draft_agreed for token in two.tokens]
        assert agreed.count(True) == two.usage.accepted
        drafted, accepted = drafted + two.usage.drafted, accepted + two.usage.accepted
    assert 0 < accepted < drafted


def test_sampled_speculation_has_the_same_distribution(engine):
    requests = [
        Request(prompt="Who", max_tokens=2, temperature=0.5, top_p=0.6, seed=i, speculate=i % 2 == 0)
        for i in range(1600)
    ]
    pairs = [tuple(t.id for t in reply.tokens) for reply in replies(engine, requests)]
    counts = {kind: Counter(pairs[kind::2]) for kind in (0, 1)}
    common = [pair for pair, n in (counts[0] + counts[1]).items() if n >= 12]
    assert len(common) >= 5
    table = [[counts[kind][pair] for pair in common] for kind in (0, 1)]
    for kind in (0, 1):
        table[kind].append(800 - sum(table[kind]) + 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


@pytest.mark.parametrize(("draft", "slope", "drafts"), [(2.0, 1.0, False), (0.01, 0.01, True)])
def test_drafting_is_enabled_only_where_it_can_be_faster(monkeypatch, draft, slope, drafts):
    """On a machine where speculation is too expensive at any acceptance, and on one where it is free."""
    files, costs = pico(), LatencyCurve(draft, tuple(1 + slope * i for i in range(16)))
    monkeypatch.setattr(engine_module, "stored_latency", lambda measure, key: costs)
    engine = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8)
    assert engine.latency is costs
    assert (engine.drafting_speedup > 1) == drafts
    reply = final_reply(engine.generate(Request(prompt="Tom", max_tokens=40)))
    assert (reply.usage.drafted > 0) == drafts
    engine.close()


def test_latency_is_measured_once_and_cached(monkeypatch):
    files = pico()
    first = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8).latency
    assert len(first.verify) == 16
    assert 0 < first.verify[0] <= first.verify[-1]
    assert first.draft > 0
    monkeypatch.setattr(engine_module, "pass_seconds", None)  # not measured again
    assert LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8).latency == first


def test_latency_model_follows_observed_times(monkeypatch):
    """When every pass takes one second, a step costs one second, whatever was measured before."""
    engine = LlamaEngine(pico().base_q8, threads=1)
    assert engine.latency.step < 1
    monkeypatch.setattr(adapter_context, "time", SimpleNamespace(perf_counter=count().__next__))
    for prompt in prompts(5):
        final_reply(engine.generate(Request(prompt=prompt, max_tokens=40, speculate=False)))
    assert engine.latency.step == 1
    engine.close()


def test_cancel_frees_the_slot_and_does_not_affect_others(engine):
    request = Request(prompt="Tom is", max_tokens=400, stop=("never",))
    whole = final_reply(engine.generate(replace(request, max_tokens=60)))
    streams = [engine.generate(request) for _ in range(12)]
    survivor = engine.generate(replace(request, max_tokens=60))
    next(streams[0])
    for stream in streams:
        stream.close()
    assert final_reply(survivor).text == whole.text
    del streams
    assert_idle(engine)


def test_threads_can_read_score_and_generate_concurrently(engine):
    requests = [Request(prompt=prompt, max_tokens=10) for prompt in prompts(24)]

    def ask(request):
        return final_reply(engine.generate(request)).text, engine.score(request, "It is 105."), engine.read(request)

    one_by_one = [ask(request) for request in requests]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, requests)) == one_by_one
    assert_idle(engine)


def test_plain_decoding_loop_of_the_benchmark_agrees_with_the_engine(model):
    """Both read the same prompt; later tokens may differ where rounding decides a near-tie."""
    bare, agreed = LlamaEngine(pico().base_q8, threads=1, cache="f16", lookup=False), 0
    for prompt in prompts(20, longest=30):
        ids, seconds = greedy_loop(model, prompt, 20, length=64, threads=1)
        tokens = final_reply(bare.generate(Request(prompt=prompt, max_tokens=20))).tokens
        agreed += ids[0] == tokens[0].id
        assert len(ids) == 20
        assert seconds > 0
    assert agreed >= 19
    bare.close()


def test_echo_equals_read(engine):
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


def test_cache_types_differ_in_size_and_little_in_logits():
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
def test_invalid_sizes_are_refused(size):
    with pytest.raises(BundleError, match="at least 1"):
        LlamaEngine(pico().base_q8, **size)


def test_garbage_collected_engine_is_closed():
    engine = LlamaEngine(pico().base_q8, threads=1, lookup=False)
    thread, weights = engine._scheduler._thread, weakref.ref(engine._model.weights)
    events = engine.generate(Request(prompt="Tom", max_tokens=50))
    del engine
    assert final_reply(events).finish_reason == "length"  # a generation in progress keeps it open
    assert thread.is_alive()
    del events
    thread.join(PATIENCE)
    assert not thread.is_alive()
    gc.collect()
    assert weights() is None


def test_weights_are_freed_with_their_engine():
    engine = LlamaEngine(pico().base_q8, threads=1)
    ask(engine, Request(prompt="Tom", max_tokens=3))
    weights = weakref.ref(engine._model.weights)
    engine.close()
    del engine
    assert weights() is None
