"""Prefix caching and prefill of the llama engine (SPEC E1, E6)."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import pytest

from cogumi.core.errors import ContextError
from cogumi.core.types import Request
from cogumi.engine.llama.binding.context import Context
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply, replies
from support.engines import CHAT, ask, ids, opened, pico, plain
from support.waiting import PATIENCE, Gate


@pytest.fixture(scope="module")
def engine():
    with closing(opened()) as engine:
        yield engine


def test_conversation_prefix_is_evaluated_once(engine):
    first = Request(prompt=ids(200, 1), max_tokens=20)
    reply = ask(engine, first)
    assert reply.usage.cached_tokens <= 1
    follow = Request(prompt=(*first.prompt, *(t.id for t in reply.tokens), *ids(30, 2)), max_tokens=20)
    warm = ask(engine, follow)
    assert warm.usage.cached_tokens == 219  # the last token of an answer has not been evaluated yet
    again = ask(engine, follow)
    assert again.usage.cached_tokens == 249  # one token must be evaluated for its logits
    cold = LlamaEngine(pico().base_q8, threads=1, slots=1, lookup=False)
    assert plain(ask(cold, follow)) == plain(warm) == plain(again)
    cold.close()


def test_adapters_do_not_share_cached_prefixes(engine):
    request = Request(prompt=ids(100, 3), max_tokens=12)
    ask(engine, request)
    adapted = ask(engine, replace(request, adapter="a"))
    assert adapted.usage.cached_tokens <= 1
    assert plain(ask(engine, replace(request, adapter="a"))) == plain(adapted)


def test_cache_stays_usable_after_cancelled_and_read_texts(engine):
    request = Request(prompt=ids(150, 4), max_tokens=100)
    whole = ask(engine, request)
    stream = engine.generate(replace(request, prompt=(*request.prompt, 7)))
    next(stream)
    stream.close()
    score = engine.score(request, "It is 105.")
    assert engine.score(request, "It is 105.") == score
    assert plain(ask(engine, request)) == plain(whole)


def test_unrelated_requests_do_not_evict_a_conversation(engine):
    talk = Request(prompt=ids(120, 5), max_tokens=5)
    ask(engine, talk)
    for seed in range(3):
        ask(engine, Request(prompt=ids(60, 50 + seed), max_tokens=3))
    assert ask(engine, talk).usage.cached_tokens == 119


@pytest.fixture
def passes(monkeypatch):
    """The number of tokens of each pass of llama.cpp."""
    sizes, decode = [], Context.decode

    def counted(context, rows, **options):
        sizes.append(sum(len(row.tokens) for row in rows))
        return decode(context, rows, **options)

    monkeypatch.setattr(Context, "decode", counted)
    return sizes


@pytest.fixture(scope="module")
def cold():
    """An engine whose cache never fits."""
    with closing(LlamaEngine(pico().base_q8, threads=1, slots=1, lookup=False)) as engine:
        yield lambda request: (engine.read(Request(prompt=ids(2, 999))), ask(engine, request))[1]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}])
def test_answer_to_a_prompt_that_was_read_begins_without_a_pass(engine, cold, passes, sampling):
    request = Request(prompt=ids(90, 6), max_tokens=7, speculate=False, **sampling)
    expected = cold(request)
    engine.read(request)
    passes.clear()
    reply = ask(engine, request)
    assert plain(reply) == plain(expected)
    assert reply.usage.cached_tokens == 90
    assert passes == [1] * (len(reply.tokens) - 1)
    engine.read(request)
    passes.clear()
    longer = replace(request, prompt=(*request.prompt, 9))
    assert plain(ask(engine, longer)) == plain(cold(longer))


def test_read_prompt_serves_every_kind_of_request(engine, cold):
    request = Request(prompt=ids(60, 16), max_tokens=7)
    for options in ({}, {"logprobs": 3}, {"echo": True}, {"hidden": True}, {"max_tokens": 1, "hidden": True}):
        asked = replace(request, **options)
        engine.read(request)
        reply, expected = ask(engine, asked), cold(asked)
        assert plain(reply) == plain(expected)
        assert reply.prompt == expected.prompt
        assert reply.hidden == pytest.approx(expected.hidden, abs=1e-4)
    engine.read(request)
    stream = engine.generate(replace(request, max_tokens=100))
    stream.close()  # before or after its first token
    engine.read(request)
    assert plain(ask(engine, request)) == plain(cold(request))


def test_hidden_state_of_an_answer_needs_no_further_pass(engine, passes):
    request = Request(prompt=ids(40, 7), max_tokens=6, hidden=True, speculate=False)
    passes.clear()
    reply = ask(engine, request)
    assert sum(passes) == 40 + len(reply.tokens) - 1
    before_last = (*request.prompt, *(token.id for token in reply.tokens[:-1]))
    assert reply.hidden == pytest.approx(engine.read(Request(prompt=before_last)).last, abs=1e-4)


def test_hidden_states_of_answers_at_the_same_time(engine):
    """Some end beside prompts or after gaps between sequences, where the pass does not return the state."""
    requests = [Request(prompt=ids(20 + 30 * i, 30 + i), max_tokens=3 + 4 * i, hidden=i % 4 != 3) for i in range(12)]
    for request, reply in zip(requests, replies(engine, requests, 12), strict=True):
        before_last = (*request.prompt, *(token.id for token in reply.tokens[:-1]))
        expected = engine.read(Request(prompt=before_last)).last if request.hidden else ()
        assert reply.hidden == pytest.approx(expected, abs=1e-4)


def test_prefill_evaluates_text_while_the_user_types(engine):
    text = "Tom is taller than Ann. Ann is taller than Bob. "
    assert engine.prefill("s", text).result(PATIENCE) == len(engine.tokenizer.encode(text))
    sent = Request(prompt=text + "Who is the tallest?", max_tokens=8, session="s")
    reply = ask(engine, sent)
    assert reply.usage.cached_tokens >= len(engine.tokenizer.encode(text)) - 2
    edited = text.replace("Bob", "Eve")
    engine.prefill("s", edited).result(PATIENCE)
    warm = ask(engine, Request(prompt=edited, max_tokens=3))
    assert warm.usage.cached_tokens == len(engine.tokenizer.encode(edited)) - 1
    with pytest.raises(ContextError):
        engine.prefill("s", text * 100)
    chat = Request(messages=CHAT)
    assert engine.prefill("s", chat).result(PATIENCE) == len(engine.tokenizer.render(chat))


def test_newer_prefill_of_a_session_replaces_the_older_one(monkeypatch):
    gate = Gate(monkeypatch)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=1, context=4096, lookup=False)
    gate.shut()
    busy = engine.generate(Request(prompt="Tom", max_tokens=60))
    gate.wait()
    futures = [engine.prefill("s", Request(prompt=ids(2000, 6)[:n])) for n in range(500, 2001, 500)]
    gate.open()
    assert [future.result(PATIENCE) for future in futures] == [0, 0, 0, 2000]  # the others had not started
    final_reply(busy)
    assert engine.free_slots == 1
    engine.close()


def test_requests_have_priority_over_prefill(monkeypatch):
    gate = Gate(monkeypatch)
    engine = LlamaEngine(pico().base_q8, threads=1, slots=2, context=1024, lookup=False)
    gate.shut(after=20)  # far fewer passes than the texts need
    ahead = [engine.prefill(f"s{i}", Request(prompt=ids(1000, i))) for i in range(10)]
    ask(engine, Request(prompt=ids(5, 99), max_tokens=2))
    assert not ahead[-1].done()
    assert not ahead[-1].cancel()
    gate.open()
    assert ahead[-1].result(PATIENCE) == 1000
    engine.close()


def test_concurrent_prefill_of_the_same_sessions(engine):
    """Every prefill ends, and the last text of each session is evaluated."""

    def type_(session):
        futures = [engine.prefill(session, "Tom is taller than Ann. " * n) for n in range(1, 12)]
        return [future.result(PATIENCE) for future in futures]

    with ThreadPoolExecutor(8) as threads:
        cached_counts = list(threads.map(type_, [f"s{i % 2}" for i in range(16)]))
    assert all(len(cached) == 11 for cached in cached_counts)
    whole = len(engine.tokenizer.encode("Tom is taller than Ann. " * 11))
    assert whole in {cached[-1] for cached in cached_counts}
