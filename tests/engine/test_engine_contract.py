"""The contract of `engine.protocol.Engine`, on the same pico model in llama.cpp, in torch and through two servers.

`served` is RemoteEngine over `cogumi serve` in another process, `foreign` the same over llama-cpp-python's server.
"""

import json
import math
import threading
from dataclasses import replace

import numpy as np
import pytest

from cogumi.core.errors import ContextError, RequestError
from cogumi.core.types import Message, Reply, Request, Token
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Capability, final_reply, replies
from support.contract import GAPS, engines
from support.engines import pico
from support.remote import CONTEXT

ASK = Request(messages=(Message("system", "Be short."), Message("user", "What is 48 plus 57?")), max_tokens=30)

DECLARED = {
    Capability.SCORES: "echo",
    Capability.HIDDEN_STATES: "hidden states",
    Capability.WHOLE_DISTRIBUTIONS: "full entropy",
    Capability.EMBEDDINGS: "embeddings",
    Capability.GRAMMARS: "grammars",
    Capability.JSON_SCHEMAS: "schemas",
}
"""Capabilities by the name of their gap. What a foreign server lacks, only that server knows."""


@pytest.mark.parametrize("kind", ["llama", "torch", "served"])
def test_engine_declares_its_capabilities(kind, opened):
    engine = opened(kind)
    assert {c for c in DECLARED if c in engine.capabilities} == {
        c for c, gap in DECLARED.items() if gap not in GAPS[kind]
    }
    for capability, method in (
        (Capability.SPECULATION, "drafting_speedup"),
        (Capability.PREFILL, "prefill"),
        (Capability.RUNTIME_ADAPTERS, "add_adapter"),
    ):
        assert capability not in engine.capabilities or hasattr(engine, method)


@pytest.mark.parametrize("engine", [kind for kind in GAPS if "hidden states" in GAPS[kind]], indirect=True)
def test_hidden_states_are_refused_without_the_capability(engine):
    with pytest.raises(RequestError, match="RemoteEngine has no hidden states; ask another engine"):
        engine.generate(replace(ASK, hidden=True))


def test_speculation_and_head_adaptation_are_declared_when_configured():
    plain = LlamaEngine(pico().base_q8, context=CONTEXT, threads=1, lookup=False)
    drafting = LlamaEngine(pico().base_q8, context=CONTEXT, threads=1)
    missing = {Capability.SPECULATION, Capability.HEAD_ADAPTATION}
    assert set(Capability) - plain.capabilities == missing
    assert set(Capability) - drafting.capabilities == {Capability.HEAD_ADAPTATION}
    plain.close()
    drafting.close()


@engines("usage", "exact tokens")
def test_usage_counts_tokens(engine):
    reply = final_reply(engine.generate(ASK))
    assert reply.usage.prompt_tokens == len(engine.tokenizer.render(ASK))
    assert reply.usage.completion_tokens == len(reply.tokens) == ASK.max_tokens


@engines()
def test_stream_is_tokens_followed_by_one_reply(engine):
    events = list(engine.generate(ASK))
    reply = events[-1]
    assert isinstance(reply, Reply)
    assert all(isinstance(event, Token) for event in events[:-1])
    assert reply.tokens == tuple(events[:-1])
    assert reply.text == "".join(token.text for token in reply.tokens)
    assert reply.finish_reason == "length"
    assert reply.signals["seconds"] >= reply.signals["first_token_seconds"] > 0


@engines("exact tokens")
def test_signals_of_greedy_tokens(engine):
    for token in final_reply(engine.generate(replace(ASK, logprobs=4, speculate=False))).tokens:
        ids, logprobs = zip(*token.top, strict=True)
        assert len(ids) == 4
        assert ids[0] == token.id
        assert list(logprobs) == sorted(logprobs, reverse=True)
        assert token.logprob == pytest.approx(logprobs[0], abs=1e-4)
        assert token.margin == pytest.approx(logprobs[0] - logprobs[1], abs=1e-4)
        assert 0 < token.entropy <= math.log(engine.tokenizer.size)
        assert token.draft_agreed is None
    assert final_reply(engine.generate(ASK)).tokens[0].top == ()


@engines()
def test_sampling_is_reproducible_with_a_seed(engine):
    wild = replace(ASK, temperature=1.0, top_p=0.9)
    texts = [final_reply(engine.generate(replace(wild, seed=seed))).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert len({final_reply(engine.generate(wild)).text for _ in range(3)}) == 3


@engines("end token")
def test_end_token_ends_the_answer_and_is_not_in_the_text(engine):
    wild = [replace(ASK, temperature=2.0, seed=seed, max_tokens=100) for seed in range(40)]
    stopped = [reply for reply in replies(engine, wild) if reply.finish_reason == "stop"]
    assert stopped
    for reply in stopped:
        ends = [token.id == engine.tokenizer.eos for token in reply.tokens]
        assert ends == [False] * (len(ends) - 1) + [True]
        assert "<|" not in reply.text


@engines("exact tokens")
def test_text_ends_before_a_stop_string_that_spans_tokens(engine):
    whole = final_reply(engine.generate(ASK)).text
    for start in range(0, len(whole) - 3, 3):
        stop = whole[start : start + 3]
        events = list(engine.generate(replace(ASK, stop=("never said", stop))))
        assert events[-1].text == whole[: whole.index(stop)]
        assert events[-1].finish_reason == "stop"
        assert "".join(event.text for event in events[:-1]) == events[-1].text


@engines()
def test_invalid_request_values_are_refused_by_the_call(engine):
    for wrong in (
        replace(ASK, temperature=-1.0),
        replace(ASK, adapter="nobody"),
        replace(ASK, messages=(Message("user", "x"),), max_tokens=0),
        replace(ASK, frequency_penalty=3.0),
        Request(prompt=()),
    ):
        with pytest.raises(RequestError):
            engine.generate(wrong)
    with pytest.raises(RequestError, match="nobody"):
        engine.read(replace(ASK, adapter="nobody"))


LONG = (7,) * (CONTEXT - 6)
MISFITS = (
    (replace(ASK, max_tokens=250), ContextError),
    (Request(prompt=LONG, max_tokens=7), ContextError),
    (Request(prompt=(5, 99_999)), RequestError),
    (replace(ASK, logit_bias={99_999: 1.0}), RequestError),
)


@engines("refuses beforehand")
def test_unanswerable_requests_are_refused_by_the_call(engine):
    for wrong, error in (*MISFITS, (Request(prompt=(5, -1)), RequestError)):
        with pytest.raises(error):
            engine.generate(wrong)


@engines("status", "echo")
def test_prompt_longer_than_the_context_is_refused(engine):
    for wrong, error in MISFITS:
        with pytest.raises(error):
            final_reply(engine.generate(wrong))
    assert final_reply(engine.generate(Request(prompt=LONG, max_tokens=6))).usage.completion_tokens == 6
    with pytest.raises(ContextError):
        engine.read(Request(prompt=(7,) * (CONTEXT + 1)))
    with pytest.raises(ContextError):
        engine.score(Request(prompt=LONG), "a long answer that does not fit")


@engines()
def test_adapters_change_only_their_own_requests(engine):
    assert engine.adapters == ("a",)
    plain, adapted, again = replies(engine, [ASK, replace(ASK, adapter="a"), ASK])
    assert [t.id for t in plain.tokens] == [t.id for t in again.tokens]
    assert [t.logprob for t in plain.tokens] == pytest.approx([t.logprob for t in again.tokens], abs=1e-5)
    assert plain.text != adapted.text


@engines("echo")
def test_adapters_change_scores(engine):
    assert engine.score(ASK, "yes") != engine.score(replace(ASK, adapter="a"), "yes")


@engines()
def test_few_shot_examples_become_earlier_turns_without_head_adaptation(engine):
    shown = replace(ASK, examples=(("What is 1 plus 1?", "two"), ("What is 2 plus 2?", "four")), max_tokens=12)
    turns = [
        Message(role, text) for pair in shown.examples for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    turned = replace(shown, examples=(), messages=(ASK.messages[0], *turns, ASK.messages[1]))
    said = final_reply(engine.generate(shown)).text
    assert said == final_reply(engine.generate(replace(shown, adapt=False))).text
    assert said == final_reply(engine.generate(turned)).text != final_reply(engine.generate(ASK)).text[: len(said)]
    for wrong in (replace(shown, adapt=True), replace(shown, examples=(("a", ""),)), replace(ASK, adapt=True)):
        with pytest.raises(RequestError):
            engine.generate(wrong)


@engines()
def test_logit_bias_can_forbid_and_force_tokens(engine):
    forced = engine.tokenizer.encode("b")[0]
    reply = final_reply(engine.generate(replace(ASK, logit_bias={forced: 100.0}, max_tokens=8)))
    assert reply.text == "b" * 8
    assert reply.tokens[0].logprob < -1  # signals are computed before the bias


@engines("exact tokens", "penalties")
def test_penalties_reduce_repetition(engine):
    plain = final_reply(engine.generate(ASK)).tokens
    assert len({token.id for token in plain}) < len(plain)
    for penalty in ({"presence_penalty": 2.0}, {"frequency_penalty": 2.0}):
        ids = [token.id for token in final_reply(engine.generate(replace(ASK, **penalty))).tokens]
        assert len(set(ids)) > len({token.id for token in plain})
        again = final_reply(engine.generate(replace(ASK, **penalty, temperature=1.0, seed=1)))
        assert again.text == final_reply(engine.generate(replace(ASK, **penalty, temperature=1.0, seed=1))).text


SCHEMA = {"type": "object", "properties": {"n": {"enum": [48, 57]}}, "required": ["n"], "additionalProperties": False}


@engines("schemas")
def test_answer_matches_its_json_schema(engine):
    for sampling in ({}, {"temperature": 1.0, "seed": 3}):
        reply = final_reply(engine.generate(replace(ASK, json_schema=json.dumps(SCHEMA), max_tokens=60, **sampling)))
        if reply.finish_reason == "stop":
            assert json.loads(reply.text)["n"] in (48, 57)
        assert reply.text.startswith("{")


GRAMMATICAL = replace(ASK, grammar='root ::= "yes" | "no"')


@engines("grammars")
def test_answer_matches_its_grammar(engine):
    assert final_reply(engine.generate(GRAMMATICAL)).text in ("yes", "no")


@pytest.mark.parametrize("engine", [kind for kind in GAPS if "grammars" in GAPS[kind]], indirect=True)
def test_invalid_grammar_is_refused(engine):
    with pytest.raises(RequestError, match="grammar"):
        engine.generate(GRAMMATICAL)


@engines("echo")
def test_echoed_prompt_equals_read(engine):
    for ask in (ASK, Request(prompt="Tom is taller than Ann.", max_tokens=5), Request(prompt=(7,), max_tokens=5)):
        reply = final_reply(engine.generate(replace(ask, echo=True, logprobs=2)))
        reading = engine.read(ask)
        assert [token.id for token in reply.prompt] == engine.tokenizer.render(ask)[1:]
        echoed = [-token.logprob for token in reply.prompt]
        assert echoed[-len(reading.surprise) :] == pytest.approx(reading.surprise, abs=1e-3)
        assert all(token.margin >= 0 and len(token.top) == 2 for token in reply.prompt)
        assert reply.text == final_reply(engine.generate(ask)).text
    assert final_reply(engine.generate(ASK)).prompt == ()


@engines("echo")
def test_a_reading_is_of_the_last_message_only(engine):
    """Earlier turns change what is expected, not what is read; a raw prompt is read from its second token on."""
    before = (Message("system", "Be brief."), Message("user", "Who is tall?"), Message("assistant", "Tom."))
    long, short = replace(ASK, messages=(*before, *ASK.messages)), replace(ASK, messages=ASK.messages)
    one, two = engine.read(long), engine.read(short)
    assert abs(len(one.surprise) - len(two.surprise)) <= 1  # the template may write something once, at the beginning
    assert len(engine.tokenizer.render(long)) > len(engine.tokenizer.render(short)) + 5
    assert len(engine.read(Request(prompt=(7, 8, 9))).surprise) == 2
    assert engine.read(long) == one


@engines("echo")
def test_prompt_can_be_echoed_without_an_answer(engine):
    """One token, one chunk and several chunks, next to a generating request."""
    writer = engine.generate(ASK)
    for prompt in ((7,), tuple(range(5, 25)), LONG):
        asked = Request(prompt=prompt, max_tokens=0, echo=True, logprobs=2)
        (reply,) = engine.generate(asked)
        assert (reply.text, reply.tokens, reply.finish_reason) == ("", (), "length")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 0)
        more = final_reply(engine.generate(replace(asked, max_tokens=1)))
        assert [t.logprob for t in reply.prompt] == pytest.approx([t.logprob for t in more.prompt], abs=1e-5)
        assert [t.id for t in reply.prompt] == list(prompt[1:])
    assert final_reply(writer).text == final_reply(engine.generate(ASK)).text
    for wrong in (replace(asked, echo=False), replace(asked, hidden=True)):
        with pytest.raises(RequestError, match="max_tokens"):
            engine.generate(wrong)


@engines("echo")
def test_score_is_the_log_probability_of_the_answer(engine):
    """The scores of successive prefixes of a greedy answer differ by each token's log-probability."""
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


@engines("echo")
def test_score_reports_whether_the_continuation_is_greedy(engine):
    """As lm-evaluation-harness needs it: a raw prompt is continued, so no end token is scored."""
    tokenizer, found = engine.tokenizer, []
    for text in ("Tom is taller than Ann.", "hello there", "Ann", "def add(a, b):", "What is 48 plus 57?"):
        prompt = Request(prompt=text, max_tokens=1)
        (token,) = final_reply(engine.generate(prompt)).tokens
        if tokenizer.encode(token.text) != [token.id]:
            continue  # part of a character, or a piece that is encoded differently on its own
        score = engine.score(prompt, token.text)
        assert (score.tokens, score.greedy) == (1, True)
        assert -score.nats == pytest.approx(token.logprob, abs=0.02)
        other = "b" if token.text != "b" else "c"
        assert engine.score(prompt, other).greedy is False
        assert engine.score(prompt, token.text + other * 20).greedy is False
        found.append(token)
    assert found
    nothing = engine.score(Request(prompt="Ann"), "")
    assert (nothing.nats, nothing.tokens, nothing.greedy) == (0.0, 0, True)
    assert engine.score(ASK, "It is 105.").greedy is False  # a random model generates another text


@engines("echo")
def test_read_returns_token_log_probabilities(engine):
    reading = engine.read(Request(prompt="Tom is taller than Ann."))
    ids = engine.tokenizer.encode("Tom is taller than Ann.")
    assert len(reading.surprise) == reading.score.tokens == len(ids) - 1
    assert reading.score.nats == pytest.approx(sum(reading.surprise))
    assert reading.score.bytes == len(engine.tokenizer.decode(ids[1:]).encode())
    assert engine.read(Request(prompt=(7,))).surprise == ()


@engines("embeddings")
def test_embedding_vectors(engine):
    rows = engine.embed(["Ann", "Tom is taller than Ann.", "", "Ann"])
    assert rows.shape == (4, 64)
    assert np.array_equal(rows[0], rows[3])
    assert rows[1].any()
    assert not rows[2].any()
    assert engine.embed([]).shape == (0, 64)


@engines("hidden states")
def test_hidden_states_of_a_prompt(engine):
    reading = engine.read(Request(prompt="Tom is taller than Ann."))
    assert len(reading.last) == len(reading.mean) == 64
    assert engine.embed(["Tom is taller than Ann."])[0] == pytest.approx(np.array(reading.mean), abs=1e-3)


@engines("hidden states")
def test_hidden_state_after_an_answer(engine):
    for ask in (ASK, replace(ASK, stop=("a",)), replace(ASK, adapter="a", temperature=1.0, seed=1)):
        reply = final_reply(engine.generate(replace(ask, hidden=True)))
        said = [token.id for token in reply.tokens]
        ids = (*engine.tokenizer.render(ask), *said[:-1])
        assert reply.hidden == pytest.approx(engine.read(Request(prompt=ids, adapter=ask.adapter)).last, abs=0.02)
        assert said == [token.id for token in final_reply(engine.generate(ask)).tokens]
    assert final_reply(engine.generate(ASK)).hidden == ()


@engines()
def test_closing_an_iterator_does_not_affect_other_requests(engine):
    streams = [engine.generate(ASK) for _ in range(6)]
    next(streams[0])
    for stream in streams[:5]:
        stream.close()
        assert list(stream) == []
    assert final_reply(streams[5]).text == final_reply(engine.generate(ASK)).text


@engines()
def test_concurrent_threads_get_their_own_answers(engine):
    prompts = [Request(prompt=f"{n} plus {n}", max_tokens=12) for n in range(16)]
    sequential = [final_reply(engine.generate(prompt_request)).text for prompt_request in prompts]
    concurrent = [""] * len(prompts)

    def ask(i):
        concurrent[i] = final_reply(engine.generate(prompts[i])).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert concurrent == sequential


@pytest.mark.parametrize("kind", GAPS)
def test_close_ends_waiting_requests(kind, opened):
    engine = opened(kind, fresh=True)
    streams = [engine.generate(replace(ASK, max_tokens=200)) for _ in range(30)]
    engine.close()
    reasons = [final_reply(stream).finish_reason for stream in streams]
    assert "cancelled" in reasons
    engine.close()
