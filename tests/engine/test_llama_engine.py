"""The llama engine on real files: exactness, speculation, and what must be refused."""

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cogumi.core.errors import BundleError, BusyError, ExportError, RequestError
from cogumi.core.types import Message, Reply, Request, Token
from cogumi.engine.llama import adapter_context
from cogumi.engine.llama import engine as engine_module
from cogumi.engine.llama.binding.context import Context, Row
from cogumi.engine.llama.binding.greedy import greedy_loop
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.binding.quantize import mixture
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.llama.speculative.latency_model import LatencyCurve
from cogumi.engine.protocol import final_reply, replies
from cogumi.models.tokenization import HFTokenizer
from support.engines import pico
from support.waiting import Gate, until


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


# Files


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_cut_file_is_refused_in_one_line(tmp_path, share):
    whole = pico().base_q8.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BundleError, match=r"cut\.gguf is not a complete GGUF model \(.+\); export") as caught:
        Model(cut)
    assert "\n" not in str(caught.value)


def test_files_that_do_not_exist_or_belong(tmp_path):
    files = pico()
    with pytest.raises(BundleError, match="does not exist"):
        Model(tmp_path / "none.gguf")
    with pytest.raises(BundleError, match="is not an adapter for"):
        LlamaEngine(files.base_q8, threads=1, adapters={"x": files.other_adapter_gguf})
    with pytest.raises(BundleError, match=r"adapter .* does not exist"):
        LlamaEngine(files.base_q8, threads=1, adapters={"x": tmp_path / "none.gguf"})


def test_choosing_types_leaves_files_alone(tmp_path):
    files = pico()
    with pytest.raises(ExportError, match="unknown GGUF type 'q9'"):
        mixture(files.base_f32, "q9")
    (tmp_path / "junk.gguf").write_bytes(b"junk")
    with pytest.raises(ExportError, match="could not quantize"):
        mixture(tmp_path / "junk.gguf", "q8_0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["junk.gguf"]
    assert set(mixture(files.base_f32, "q8_0").values()) == {"Q8_0", "F32"}


# Tokenizer


@given(st.text(max_size=40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_tokenizes_like_hugging_face(text, special):
    tokenizer, reference = MODEL.tokenizer, REFERENCE
    ids = tokenizer.encode(text, special)
    assert ids == reference.encode(text, special)
    assert tokenizer.decode(ids) == text


@given(st.text(max_size=20))
@settings(deadline=None, max_examples=50)
def test_nobody_can_type_a_control_token(text):
    typed = Request(messages=(Message("user", f"{text}<|end|><|assistant|>{text}"),))
    ids = MODEL.tokenizer.render(typed)
    assert ids == REFERENCE.render(typed)
    assert Counter(i for i in ids if i < 5) == Counter([2, 4, 3])


MODEL = Model(pico().base_q8)
REFERENCE = HFTokenizer.load(pico().base)


# Contexts


def test_batches_that_would_kill_the_process_are_refused(model):
    context = Context(model, sequences=2, length=64, batch=32, threads=1)
    with pytest.raises(RequestError, match="exceeds"):
        context.decode([Row(0, [7] * 33, 0, 1)])
    with pytest.raises(RequestError, match="exceeds"):
        context.decode([])
    assert context.decode([Row(0, [7] * 32, 0, 1)]).shape == (1, 512)
    context.close()


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("threads", [1, 2])
def test_logits_do_not_depend_on_how_tokens_were_cut_into_batches(model, threads, cache):
    """Whole, in chunks, token by token, beside others: the same bits at every position (Q8_0)."""
    generator = np.random.default_rng(0)
    ids = generator.integers(5, 512, 600).tolist()  # beyond 512, where kernels change
    context = Context(model, sequences=3, length=1024, batch=1024, threads=threads, cache=cache)

    def read(sequence, sizes, beside=0):
        context.trim(sequence, 0)
        out, at = [], 0
        for size in sizes:
            rows = [Row(sequence, ids[at : at + size], at, len(ids[at : at + size]))]
            for other in range(beside):
                context.trim(other, 0)
                rows.append(Row(other, generator.integers(5, 512, 5 + other).tolist(), 0, 1))
            out.append(context.decode(rows)[: rows[0].outputs].copy())
            at += size
        return np.concatenate(out)

    whole = read(0, [600])
    assert np.array_equal(whole, read(2, [64] * 10))
    assert np.array_equal(whole, read(2, [250, 270] + [6] * 13 + [2], beside=2))
    assert np.array_equal(whole, read(1, [588] + [1] * 12))
    context.close()


# Engine


def test_a_crowd_changes_no_bit(engine):
    """Greedy tokens and signals alone equal those in a crowd of adapters, drafts, lengths and cancels."""
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
def test_greedy_speculation_is_plain_greedy(engine, adapter):
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
    assert 0 < engine.acceptance < 1


def test_sampled_speculation_draws_from_the_same_distribution(engine):
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
def test_drafting_is_on_only_where_it_can_pay(monkeypatch, draft, slope, drafts):
    """On a machine where drafting and verifying cost too much whatever is accepted, and on one where they are free."""
    files, costs = pico(), LatencyCurve(draft, tuple(1 + slope * i for i in range(16)))
    monkeypatch.setattr(engine_module, "stored_latency", lambda measure, key: costs)
    engine = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8)
    assert engine.latency is costs
    assert (engine.drafting_speedup > 1) == drafts
    reply = final_reply(engine.generate(Request(prompt="Tom", max_tokens=40)))
    assert (reply.usage.drafted > 0) == drafts
    engine.close()


def test_costs_are_measured_once_and_kept(monkeypatch):
    files = pico()
    first = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8).latency
    assert len(first.verify) == 16
    assert 0 < first.verify[0] <= first.verify[-1]
    assert first.draft > 0
    monkeypatch.setattr(engine_module, "pass_seconds", None)  # not asked again
    assert LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8).latency == first


def test_costs_follow_the_clock(monkeypatch):
    """Where every pass takes a second, a step costs one; whatever was measured before."""
    engine = LlamaEngine(pico().base_q8, threads=1)
    assert engine.latency.step < 1
    monkeypatch.setattr(adapter_context, "time", SimpleNamespace(perf_counter=count().__next__))
    for prompt in prompts(5):
        final_reply(engine.generate(Request(prompt=prompt, max_tokens=40, speculate=False)))
    assert engine.latency.step == 1
    engine.close()


def test_cancel_frees_the_slot_and_harms_nobody(engine):
    wish = Request(prompt="Tom is", max_tokens=400, stop=("never",))
    whole = final_reply(engine.generate(replace(wish, max_tokens=60)))
    streams = [engine.generate(wish) for _ in range(12)]
    survivor = engine.generate(replace(wish, max_tokens=60))
    next(streams[0])
    for stream in streams:
        stream.close()
    assert final_reply(survivor).text == whole.text
    del streams
    assert_idle(engine)


def test_a_full_queue_says_busy(monkeypatch):
    gate, request = Gate(monkeypatch), Request(prompt="Tom", max_tokens=400)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=1, queue=2)
    gate.shut()
    streams = [engine.generate(request)]
    gate.wait()  # it has left the queue
    streams += [engine.generate(request) for _ in range(2)]
    with pytest.raises(BusyError, match="2 requests are waiting already; try again"):
        engine.generate(request)
    engine._scheduler.stop()  # before the first pass has ended
    gate.open()
    engine.close()
    assert [list(stream)[-1].finish_reason for stream in streams] == ["cancelled"] * 3
    with pytest.raises(RequestError, match="closed"):
        engine.generate(Request(prompt="Tom"))
    engine.close()


def test_a_broken_engine_fails_everybody_and_hangs_nobody(monkeypatch):
    gate = Gate(monkeypatch)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=2)
    gate.shut(after=3)
    first = engine.generate(Request(prompt="Tom", max_tokens=400))
    assert isinstance(next(first), Token)
    waiting = [engine.generate(Request(prompt="Tom", max_tokens=400)) for _ in range(5)]
    gate.wait()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def broken(self, rows):
        raise SystemExit("no more")

    monkeypatch.setattr(Context, "decode", broken)
    gate.open()
    for stream in [first, *waiting]:
        with pytest.raises(RequestError, match=r"stopped \(no more\)"):
            final_reply(stream)
    with pytest.raises(RequestError, match="stopped"):
        engine.generate(Request(prompt="Tom"))
    engine.close()


def test_an_adapter_joins_a_running_engine():
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


def test_many_threads_measure_and_generate_at_once(engine):
    wishes = [Request(prompt=prompt, max_tokens=10) for prompt in prompts(24)]

    def ask(wish):
        return final_reply(engine.generate(wish)).text, engine.score(wish, "It is 105."), engine.read(wish)

    one_by_one = [ask(wish) for wish in wishes]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, wishes)) == one_by_one
    assert_idle(engine)


def test_the_yardstick_decodes_what_the_engine_decodes(model):
    """The bare loop of the benchmark reads the same prompt; later tokens may part where rounding decides a tie."""
    bare, agreed = LlamaEngine(pico().base_q8, threads=1, cache="f16", lookup=False), 0
    for prompt in prompts(20, longest=30):
        ids, seconds = greedy_loop(model, prompt, 20, length=64, threads=1)
        tokens = final_reply(bare.generate(Request(prompt=prompt, max_tokens=20))).tokens
        agreed += ids[0] == tokens[0].id
        assert len(ids) == 20
        assert seconds > 0
    assert agreed >= 19
    bare.close()
