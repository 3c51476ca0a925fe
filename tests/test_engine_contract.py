"""What every engine promises (runtime.engine.Engine), on the same pico model in both engines, and across them."""

import math
import threading
from dataclasses import replace

import numpy as np
import pytest

from cogumi.errors import ContextError, RequestError
from cogumi.runtime.engine import final_reply, replies
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.runtime.torch_engine import TorchEngine
from cogumi.types import Message, Reply, Request, Token
from helpers_engines import pico

ASK = Request(messages=(Message("system", "Be short."), Message("user", "What is 48 plus 57?")), max_tokens=30)


def open_engine(kind, file="base_q8"):
    files = pico()
    if kind == "torch":
        return TorchEngine(files.base, adapters={"a": files.adapter}, context=256)
    return LlamaEngine(getattr(files, file), adapters={"a": files.adapter_gguf}, context=256, threads=1)


@pytest.fixture(scope="module")
def both():
    engines = {kind: open_engine(kind) for kind in ("llama", "torch")}
    yield engines
    for engine in engines.values():
        engine.close()


@pytest.fixture(params=["llama", "torch"])
def engine(request, both):
    return both[request.param]


def test_tokens_then_one_reply(engine):
    events = list(engine.generate(ASK))
    reply = events[-1]
    assert isinstance(reply, Reply)
    assert all(isinstance(event, Token) for event in events[:-1])
    assert reply.tokens == tuple(events[:-1])
    assert reply.text == "".join(token.text for token in reply.tokens)
    assert reply.usage.prompt_tokens == len(engine.tokenizer.render(ASK))
    assert reply.usage.completion_tokens == len(reply.tokens) == ASK.max_tokens
    assert reply.finish_reason == "length"
    assert reply.signals["seconds"] >= reply.signals["first_token_seconds"] > 0


def test_signals_of_greedy_tokens(engine):
    for token in final_reply(engine.generate(replace(ASK, logprobs=4))).tokens:
        ids, logprobs = zip(*token.top, strict=True)
        assert len(ids) == 4
        assert ids[0] == token.id
        assert list(logprobs) == sorted(logprobs, reverse=True)
        assert token.logprob == pytest.approx(logprobs[0], abs=1e-4)
        assert token.margin == pytest.approx(logprobs[0] - logprobs[1], abs=1e-4)
        assert 0 < token.entropy <= math.log(engine.tokenizer.size)
        assert token.draft_agreed is None
    assert final_reply(engine.generate(ASK)).tokens[0].top == ()


def test_sampling_repeats_with_its_seed(engine):
    wild = replace(ASK, temperature=1.0, top_p=0.9)
    texts = [final_reply(engine.generate(replace(wild, seed=seed))).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({final_reply(engine.generate(wild)).text for _ in range(3)}) == 3


def test_the_end_token_ends_and_is_no_text(engine):
    wild = [replace(ASK, temperature=2.0, seed=seed, max_tokens=100) for seed in range(40)]
    stopped = [reply for reply in replies(engine, wild) if reply.finish_reason == "stop"]
    assert stopped
    for reply in stopped:
        ends = [token.id == engine.tokenizer.eos for token in reply.tokens]
        assert ends == [False] * (len(ends) - 1) + [True]
        assert "<|" not in reply.text


def test_stop_strings_end_before_themselves_across_tokens(engine):
    whole = final_reply(engine.generate(ASK)).text
    for start in range(0, len(whole) - 3, 3):
        stop = whole[start : start + 3]
        events = list(engine.generate(replace(ASK, stop=("never said", stop))))
        assert events[-1].text == whole[: whole.index(stop)]
        assert events[-1].finish_reason == "stop"
        assert "".join(event.text for event in events[:-1]) == events[-1].text


def test_what_cannot_be_answered_is_refused_by_the_call(engine):
    long = (7,) * 250
    for wrong, error in (
        (replace(ASK, max_tokens=250), ContextError),
        (Request(prompt=long, max_tokens=7), ContextError),
        (replace(ASK, temperature=-1.0), RequestError),
        (replace(ASK, adapter="nobody"), RequestError),
        (replace(ASK, messages=(Message("user", "x"),), max_tokens=0), RequestError),
        (Request(prompt=()), RequestError),
        (Request(prompt=(5, 99_999)), RequestError),
        (Request(prompt=(5, -1)), RequestError),
    ):
        with pytest.raises(error):
            engine.generate(wrong)
    assert final_reply(engine.generate(Request(prompt=long, max_tokens=6))).usage.completion_tokens == 6
    with pytest.raises(ContextError):
        engine.read(Request(prompt=(7,) * 257))
    with pytest.raises(ContextError):
        engine.score(Request(prompt=long), "a long answer that does not fit")
    with pytest.raises(RequestError, match="nobody"):
        engine.read(replace(ASK, adapter="nobody"))


def test_adapters_change_answers_and_leave_no_trace(engine):
    assert engine.adapters == ("a",)
    plain, adapted, again = replies(engine, [ASK, replace(ASK, adapter="a"), ASK])
    assert [t.id for t in plain.tokens] == [t.id for t in again.tokens]
    assert [t.logprob for t in plain.tokens] == pytest.approx([t.logprob for t in again.tokens], abs=1e-5)
    assert plain.text != adapted.text
    assert engine.score(ASK, "yes") != engine.score(replace(ASK, adapter="a"), "yes")


def test_score_is_the_log_probability_of_the_answer(engine):
    """Sum over greedy steps: the score of each prefix of ids differs by the token's own log-probability."""
    prompt = engine.tokenizer.render(ASK)
    tokens = final_reply(engine.generate(replace(ASK, max_tokens=5))).tokens
    ids = tuple(prompt) + tuple(token.id for token in tokens)
    reading = engine.read(Request(prompt=ids))
    assert reading.surprise[-5:] == pytest.approx([-token.logprob for token in tokens], abs=0.02)
    answer = engine.score(ASK, "It is 105.")
    assert answer.bytes == 10
    assert answer.tokens == len(engine.tokenizer.encode("It is 105.")) + 1
    whole = (*prompt, *engine.tokenizer.encode("It is 105."), engine.tokenizer.eos)
    assert answer.nats == pytest.approx(sum(engine.read(Request(prompt=whole)).surprise[-answer.tokens :]), rel=1e-4)
    assert engine.score(ASK, "").tokens == 1


def test_reading_and_embedding(engine):
    reading = engine.read(Request(prompt="Tom is taller than Ann."))
    ids = engine.tokenizer.encode("Tom is taller than Ann.")
    assert len(reading.surprise) == reading.score.tokens == len(ids) - 1
    assert reading.score.nats == pytest.approx(sum(reading.surprise))
    assert reading.score.bytes == len(engine.tokenizer.decode(ids[1:]).encode())
    assert len(reading.last) == len(reading.mean) == 64
    rows = engine.embed(["Ann", "Tom is taller than Ann.", "", "Ann"])
    assert rows.shape == (4, 64)
    assert rows[1] == pytest.approx(np.array(reading.mean), abs=1e-3)
    assert np.array_equal(rows[0], rows[3])
    assert not rows[2].any()
    assert engine.embed([]).shape == (0, 64)
    assert engine.read(Request(prompt=(7,))).surprise == ()


def test_a_closed_iterator_is_over_and_others_go_on(engine):
    streams = [engine.generate(ASK) for _ in range(6)]
    next(streams[0])
    for stream in streams[:5]:
        stream.close()
        assert list(stream) == []
    assert final_reply(streams[5]).text == final_reply(engine.generate(ASK)).text


def test_many_threads_get_their_own_answers(engine):
    wishes = [Request(prompt=f"{n} plus {n}", max_tokens=12) for n in range(16)]
    alone = [final_reply(engine.generate(wish)).text for wish in wishes]
    crowd = [""] * len(wishes)

    def ask(i):
        crowd[i] = final_reply(engine.generate(wishes[i])).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert crowd == alone


@pytest.mark.parametrize("kind", ["llama", "torch"])
def test_close_ends_what_waits(kind):
    engine = open_engine(kind)
    streams = [engine.generate(replace(ASK, max_tokens=200)) for _ in range(30)]
    engine.close()
    reasons = [final_reply(stream).finish_reason for stream in streams]
    assert "cancelled" in reasons
    engine.close()


def test_the_engines_agree(both):
    """The same model in two libraries, both in fp32 (SPEC E7: scores within 1%)."""
    llama, torch = open_engine("llama", "base_f32"), both["torch"]
    for adapter in (None, "a"):
        ask = replace(ASK, adapter=adapter)
        assert llama.tokenizer.render(ask) == torch.tokenizer.render(ask)
        for answer in ("It is 105.", "naïve 日本語 🙂", ""):
            one, two = llama.score(ask, answer), torch.score(ask, answer)
            assert (one.tokens, one.bytes) == (two.tokens, two.bytes)
            assert one.nats == pytest.approx(two.nats, rel=0.01)
        one, two = llama.read(ask), torch.read(ask)
        assert one.score.bytes == two.score.bytes
        assert one.surprise == pytest.approx(two.surprise, abs=0.05)
        assert one.last == pytest.approx(two.last, abs=0.05)
        assert one.mean == pytest.approx(two.mean, abs=0.05)
        one, two = (final_reply(engine.generate(replace(ask, max_tokens=8))) for engine in (llama, torch))
        assert [token.id for token in one.tokens] == [token.id for token in two.tokens]
        assert [t.entropy for t in one.tokens] == pytest.approx([t.entropy for t in two.tokens], abs=0.05)
    llama.close()
