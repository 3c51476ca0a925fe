"""The `cogumi` object in OpenAI responses is parsed and validated: tiers, decisions, signals, usage."""

import contextlib
import threading
from dataclasses import replace

import openai
import pytest

from cogumi.cascade.opening import open_cascade
from cogumi.core.types import Decision, Message, Request, Token, Usage
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.engine.remote import RemoteEngine
from cogumi.engine.reply_extension import read_extension
from support.bundle import make_bundle
from support.scripted_server import begin, chunk, engine_at, scripted, send
from support.serve import running
from support.waiting import PATIENCE

ASK = Request(messages=(Message("user", "echo abc"),))
DECISION = {
    "tier": "base",
    "signal": "p_correct",
    "value": 0.5,
    "threshold": 0.8,
    "accepted": False,
    "reason": "0.50 misses 0.80",
}
EXTENSION = {
    "tier": "modifier:law",
    "route": "modifier",
    "p_correct": 0.75,
    "accepted": True,
    "decisions": [DECISION],
    "signals": {"length": 3.0, "seconds": 99.0},
    "usage": {"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 1, "drafted": 4, "accepted": 3},
}


def answers_with(extension):
    """A server whose last chunk carries `extension` as its `cogumi` object."""

    def behave(handler):
        begin(handler)
        for one in (chunk("ab"), chunk("c", "stop") | {"cogumi": extension}, "[DONE]"):
            send(handler, one)

    return behave


def test_cogumi_object_is_parsed():
    with scripted(answers_with(EXTENSION)) as (url, _), engine_at(url) as engine:
        *tokens, decision, reply = engine.generate(ASK)
    assert decision == Decision(**DECISION)
    assert [token.text for token in tokens] == ["ab", "c"]
    assert (reply.text, reply.tier, reply.route, reply.p_correct) == ("abc", "modifier:law", "modifier", 0.75)
    assert reply.accepted
    assert reply.decisions == (decision,)
    assert reply.usage == Usage(9, 5, 1, 4, 3)
    assert reply.signals["length"] == 3.0
    assert 0 < reply.signals["first_token_seconds"] <= reply.signals["seconds"] < 99  # measured by the client


@pytest.mark.parametrize(
    "extension",
    [
        None,
        7,
        "cogumi",
        [],
        [EXTENSION],
        EXTENSION | {"tier": 5},
        EXTENSION | {"tier": None},
        EXTENSION | {"p_correct": 1.5},
        EXTENSION | {"accepted": "perhaps"},
        EXTENSION | {"p_correct": float("nan")},
        EXTENSION | {"p_correct": "much"},
        EXTENSION | {"decisions": 5},
        EXTENSION | {"decisions": [DECISION, {"tier": "base"}]},
        EXTENSION | {"decisions": [DECISION | {"value": "high"}]},
        EXTENSION | {"signals": {"length": "long"}},
        EXTENSION | {"signals": [1, 2]},
        EXTENSION | {"usage": {"prompt_tokens": "many"}},
        {"tokens": 5, "nested": {"a": [{}]}},
    ],
)
def test_malformed_or_foreign_cogumi_object_is_ignored(extension):
    with scripted(answers_with(extension)) as (url, _), engine_at(url) as engine:
        *tokens, reply = engine.generate(ASK)
    assert all(isinstance(token, Token) for token in tokens)
    assert (reply.text, reply.finish_reason, reply.usage) == ("abc", "stop", Usage(0, 2))
    assert (reply.tier, reply.route, reply.p_correct, reply.decisions) == ("", "", None, ())
    assert not reply.accepted
    assert reply.signals.keys() == {"seconds", "first_token_seconds"}


def test_keys_of_a_newer_server_are_ignored():
    newer = EXTENSION | {"mood": "good", "decisions": [DECISION | {"mood": "good"}]}
    with scripted(answers_with(newer)) as (url, _), engine_at(url) as engine:
        reply = final_reply(engine.generate(ASK))
    assert (reply.tier, reply.decisions) == ("modifier:law", (Decision(**DECISION),))


def test_unstreamed_response_carries_the_same_object(slow):
    """Read without streaming, as by other clients."""
    _, url = slow
    client = openai.OpenAI(base_url=url, api_key="any", max_retries=0, timeout=PATIENCE)
    completion = client.chat.completions.create(model="cogumi", messages=[{"role": "user", "content": "echo abc"}])
    extension = read_extension(completion.to_dict()["cogumi"])
    with contextlib.closing(RemoteEngine(url, "cogumi")) as engine:
        reply = final_reply(engine.generate(ASK))
    assert (extension.tier, extension.route, extension.p_correct) == (reply.tier, reply.route, reply.p_correct)
    assert (extension.decisions, extension.usage) == (reply.decisions, reply.usage)


def test_served_cascade_gives_the_same_decisions_as_a_local_one(tmp_path, monkeypatch):
    # Measured anew with every answer, it may pass its threshold between the two.
    monkeypatch.setattr(LlamaEngine, "drafting_speedup", property(lambda engine: 0.5))
    bundle, ready = make_bundle(tmp_path), threading.Event()
    cascade = open_cascade(bundle, threads=1)
    timing = {"seconds", "first_token_seconds"}
    with running(lambda: cascade, on_ready=lambda _: ready.set()) as port:
        assert ready.wait(PATIENCE)
        url = f"http://127.0.0.1:{port}/v1"
        for mode, model in ((None, "cogumi"), ("accurate", "cogumi:accurate")):
            ask = Request(messages=(Message("user", "What is 48 plus 57?"),), max_tokens=12)
            near = final_reply(cascade.generate(replace(ask, mode=mode)))
            with contextlib.closing(RemoteEngine(url, model, tokenizer=bundle / "base.gguf")) as remote:
                *events, far = remote.generate(ask)
            assert near.tier
            assert near.decisions
            assert [event for event in events if isinstance(event, Decision)] == list(near.decisions)
            assert (far.text, far.finish_reason) == (near.text, near.finish_reason)
            assert (far.tier, far.route, far.p_correct) == (near.tier, near.route, near.p_correct)
            assert (far.decisions, far.accepted) == (near.decisions, near.accepted)
            assert far.usage.completion_tokens == near.usage.completion_tokens
            assert far.signals.keys() == near.signals.keys() | timing
            assert {k: far.signals[k] for k in near.signals.keys() - timing} == pytest.approx(
                {k: near.signals[k] for k in near.signals.keys() - timing}
            )
