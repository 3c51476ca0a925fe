"""Engines over the same model give the same answers: llama.cpp, torch, our server and llama-cpp-python's server."""

from dataclasses import replace

import openai
import pytest

from cogumi.core.types import Message, Request
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from support.engines import pico
from support.remote import CONTEXT

ASK = Request(messages=(Message("system", "Be short."), Message("user", "What is 48 plus 57?")), max_tokens=30)


def test_llama_and_torch_engines_agree(opened):
    """The same model in both libraries in fp32: scores agree within 1%."""
    files, other = pico(), opened("torch")
    llama = LlamaEngine(files.base_f32, adapters={"a": files.adapter_gguf}, context=CONTEXT, threads=1, cache="f16")
    for adapter in (None, "a"):
        ask = replace(ASK, adapter=adapter)
        assert llama.tokenizer.render(ask) == other.tokenizer.render(ask)
        for answer in ("It is 105.", "naïve 日本語 🙂", ""):
            one, two = llama.score(ask, answer), other.score(ask, answer)
            assert (one.tokens, one.bytes) == (two.tokens, two.bytes)
            assert one.nats == pytest.approx(two.nats, rel=0.01)
        one, two = llama.read(ask), other.read(ask)
        assert one.score.bytes == two.score.bytes
        assert one.surprise == pytest.approx(two.surprise, abs=0.05)
        assert one.last == pytest.approx(two.last, abs=0.05)
        assert one.mean == pytest.approx(two.mean, abs=0.05)
        one, two = (final_reply(engine.generate(replace(ask, max_tokens=8))) for engine in (llama, other))
        assert [token.id for token in one.tokens] == [token.id for token in two.tokens]
        assert [t.entropy for t in one.tokens] == pytest.approx([t.entropy for t in two.tokens], abs=0.05)
    llama.close()


def test_our_server_answers_like_its_engine(opened, servers):
    _, file = servers("served")
    near, far = LlamaEngine(file, context=CONTEXT, threads=1), opened("served")
    for ask in (ASK, Request(prompt="Tom is", max_tokens=20), replace(ASK, temperature=1.0, seed=5)):
        one, two = (final_reply(engine.generate(replace(ask, logprobs=3))) for engine in (near, far))
        ended = len(one.tokens) - (one.tokens[-1].id == near.tokenizer.eos and bool(ask.messages))
        assert [(t.id, t.text, t.top) for t in one.tokens[:ended]] == [(t.id, t.text, t.top) for t in two.tokens]
        assert (one.text, one.finish_reason) == (two.text, two.finish_reason)
        assert (one.usage.prompt_tokens, one.usage.completion_tokens) == (
            two.usage.prompt_tokens,
            two.usage.completion_tokens,
        )
        bounds = [(t.entropy, 0.999 * u.entropy) for t, u in zip(one.tokens, two.tokens, strict=False)]
        assert all(exact >= bound > 0 for exact, bound in bounds)
    one, two = near.read(ASK), far.read(ASK)
    assert one.score == two.score
    assert one.surprise == two.surprise
    assert near.score(ASK, "It is 105.") == far.score(ASK, "It is 105.")
    near.close()


@pytest.mark.parametrize("more", [0, 1])
def test_lm_eval_requests_detect_greedy_continuations(opened, servers, more):
    """lm-evaluation-harness sends prompt and continuation as one echoed prompt and compares log-probabilities."""
    url, file = servers("served")
    near, client = LlamaEngine(file, context=CONTEXT, threads=1), openai.OpenAI(base_url=url, api_key="any")
    prompt = near.tokenizer.encode("Tom is taller than Ann.")
    best = [token.id for token in final_reply(near.generate(Request(prompt=tuple(prompt), max_tokens=4))).tokens]
    for continuation, greedy in ((best, True), ([*best[:3], best[3] + 1], False), ([best[0] + 1, *best[1:]], False)):
        answer = client.completions.create(
            model="cogumi:base",
            prompt=[[*prompt, *continuation]],
            temperature=0,
            max_tokens=more,
            logprobs=1,
            seed=1234,
            echo=True,
        )
        assert answer.usage.completion_tokens == more
        logprobs, end = answer.choices[0].logprobs, len(prompt) + len(continuation)
        values, tops = logprobs.token_logprobs[len(prompt) : end], logprobs.top_logprobs[len(prompt) : end]
        assert len(values) == len(continuation) == len(logprobs.tokens) - len(prompt) - more
        assert all(value == max(top.values()) for value, top in zip(values, tops, strict=True)) == greedy
        exact = near.read(Request(prompt=(*prompt, *continuation))).surprise[-4:]
        assert [-value for value in values] == pytest.approx(exact, abs=1e-4)
    near.close()


def test_echoed_prompt_without_an_answer_is_streamed(servers):
    client = openai.OpenAI(base_url=servers("served")[0], api_key="any")
    stream = client.completions.create(model="cogumi:base", prompt="Tom is", max_tokens=0, echo=True, stream=True)
    choices = [chunk.choices[0] for chunk in stream]
    assert "".join(choice.text for choice in choices) == "Tom is"
    assert choices[-1].finish_reason == "length"
    with pytest.raises(openai.BadRequestError, match="set echo"):
        client.completions.create(model="cogumi:base", prompt="Tom is", max_tokens=0)


def test_foreign_server_answers_like_its_engine(opened):
    """As far as its streams show: text of complete characters, and log-probabilities up to the first missing one."""
    near = LlamaEngine(pico().base_f32, context=CONTEXT, threads=1, cache="f16")
    far, ask = opened("foreign"), Request(prompt="Tom is", max_tokens=1, logprobs=1)
    for text in ("Tom is", "hello there", "What is 48 plus 57?", "Ann", "def add(a, b):"):
        one, two = (final_reply(engine.generate(replace(ask, prompt=text))).tokens[0] for engine in (near, far))
        assert one.logprob == pytest.approx(two.logprob, abs=0.05)
        assert two.id in (one.id, -1)
    near.close()
