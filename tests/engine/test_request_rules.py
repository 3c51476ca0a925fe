"""Constraints of a request in the llama engine (SPEC E1): logit bias, penalties, grammars and schemas."""

import json
from contextlib import closing, suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import RequestError
from cogumi.core.types import Message, Request
from cogumi.engine.gbnf import check_grammar
from cogumi.engine.llama.binding.grammar import Grammar
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.protocol import final_reply
from support.engines import CHAT, ask, opened, pico, plain
from support.waiting import PATIENCE


@pytest.fixture(scope="module")
def engine():
    with closing(opened()) as engine:
        yield engine


def test_logit_bias_can_force_and_forbid_tokens(engine):
    request = Request(messages=CHAT, max_tokens=6)
    usual = ask(engine, request).tokens[0].id
    assert ask(engine, replace(request, logit_bias={usual: -100.0})).tokens[0].id != usual
    forced = ask(engine, replace(request, logit_bias={77: 100.0}))
    assert [token.id for token in forced.tokens] == [77] * 6
    with pytest.raises(RequestError, match="vocabulary ends at 511"):
        engine.generate(replace(request, logit_bias={512: 1.0}))


def test_penalties_stop_repetition(engine):
    stuck = Request(messages=CHAT, max_tokens=30, logit_bias={77: 6.0, 78: 5.9})
    counts = [len({t.id for t in ask(engine, replace(stuck, frequency_penalty=p)).tokens}) for p in (0.0, 2.0)]
    assert counts[0] < counts[1]


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}, "day": {"enum": list("123456789")}},
        "required": ["city", "day"],
    }
)


@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_answer_matches_its_schema(engine, temperature, speculate):
    for seed in range(8):
        request = Request(
            messages=CHAT, max_tokens=200, json_schema=SCHEMA, temperature=temperature, seed=seed, speculate=speculate
        )
        reply = ask(engine, request)
        assert reply.finish_reason == "stop"
        answer = json.loads(reply.text)
        assert answer["city"] in ("Paris", "Rome")
        assert answer["day"] in list("123456789")


def test_speculation_does_not_change_answers_under_a_grammar(engine):
    request = Request(messages=CHAT, max_tokens=60, grammar='root ::= [a-z ]+ ("." | "!")', logit_bias={40: 3.0})
    one, two = (ask(engine, replace(request, speculate=x, frequency_penalty=0.5)) for x in (False, True))
    assert plain(one) == plain(two)
    assert two.usage.drafted > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grammar": "root ::= ("}, "cannot be used"),
        ({"grammar": ""}, "cannot be used"),
        ({"grammar": 'root ::= root "a"'}, "left recursion"),
        ({"json_schema": "nonsense"}, "JSON schema"),
        ({"json_schema": '{"type": "wrong"}'}, "wrong"),
        ({"grammar": 'root ::= "a"', "json_schema": "{}"}, "one of them"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"frequency_penalty": 9.0}, "frequency_penalty"),
        ({"presence_penalty": float("inf")}, "presence_penalty"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias"),
        ({"seed": -1}, "seed"),
        ({"logprobs": 21}, "logprobs"),
    ],
)
def test_invalid_constraints_are_refused_by_the_call(engine, wrong, message):
    with pytest.raises(RequestError, match=message):
        engine.generate(replace(Request(messages=CHAT), **wrong))


def test_grammar_without_an_allowed_token_fails_only_its_request(engine, monkeypatch):
    other = engine.generate(Request(messages=CHAT, max_tokens=100))

    def nothing_left(self, logits):
        raise RequestError("the grammar allows no token of this vocabulary here; loosen it")

    monkeypatch.setattr(Grammar, "mask", nothing_left)
    stuck = engine.generate(Request(messages=CHAT, max_tokens=9, grammar='root ::= "a"', logit_bias={77: 50.0}))
    with pytest.raises(RequestError, match="allows no token"):
        final_reply(stuck)
    assert final_reply(other).finish_reason in ("stop", "length")


def test_tokens_forbidden_by_a_grammar_cannot_be_accepted():
    """llama.cpp would abort the process."""
    tokenizer = Model(pico().base_q8).tokenizer
    grammar = Grammar(tokenizer, 'root ::= "no"')
    for token in (tokenizer.eos, 77, tokenizer.encode("o")[0]):
        assert not grammar.allows(token)
        with pytest.raises(RequestError, match="does not allow"):
            grammar.accept(token)
    for token in tokenizer.encode("no"):
        grammar.accept(token)
    row = np.zeros(tokenizer.size, np.float32)
    grammar.mask(row)
    assert np.flatnonzero(row == 0).tolist() == [tokenizer.eos]
    grammar.accept(tokenizer.eos)


@pytest.mark.parametrize(
    "grammar",
    [
        'root ::= "a" "' + "(" * 200 + '"',
        'root ::= "a" [(b(((]{1,3} # ((((({9,3}' + "(" * 2000,
        "root ::= " + "(" * 1000 + '"a"' + ")" * 1000,
        "root ::= " + '("a" ' * 1000 + ")?" * 1000 + ' "a"',
        'root ::= "a"{1,1000}',
        'root ::= "a" (("b"){20}){100}',
        'root ::= "a" "\\"" "b"{3}',
        'root ::= ("a" "b"?){2,60}',
    ],
)
def test_harmless_grammars_that_resemble_dangerous_ones_are_accepted(engine, grammar):
    assert ask(engine, Request(messages=CHAT, max_tokens=20, grammar=grammar)).text.startswith("a")


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('root ::= (("a"?){20}){10}', "consecutive parts that may be empty"),
        ('root ::= (("a"?){50}){50}', "consecutive parts that may be empty"),
        ('root ::= ("a"?){1000}', "consecutive parts that may be empty"),
        ('root ::= "a"*{60}', "consecutive parts that may be empty"),
        ('root ::= ("a" | ""){60}', "consecutive parts that may be empty"),
        ('root ::= ("a" | ){60}', "consecutive parts that may be empty"),
        ("root ::= " + '"a"? ' * 60, "consecutive parts that may be empty"),
        ("root ::= " + '("a"? "b"?) ' * 30, "consecutive parts that may be empty"),
        ('root ::= "a"{5,2}', "swapped limits"),
        ('root ::= "a"{ 0005 , 0002 }', "swapped limits"),
        ('root ::= "a"{1,99999}', "more than 1000 times"),
        ('root ::= "a"{' + "9" * 5000 + "}", "more than 1000 times"),
        ("root ::= " + "(" * 1600 + '"a"' + ")" * 1600, "nests"),
        ("root ::= [" * 12_000, "characters"),
    ],
)
@pytest.mark.timeout(PATIENCE)
def test_grammar_that_would_hang_or_crash_is_refused(grammar, message):
    with pytest.raises(RequestError, match=message):
        check_grammar(grammar)


@given(st.text(alphabet='ab"[]{}()|?*+\\,059 :=#\n.-', max_size=200))
@settings(deadline=None)
def test_any_text_can_be_checked_as_a_grammar(text):
    with suppress(RequestError):
        check_grammar("root ::= " + text)


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 20000 + '"a"' + ")" * 20000,
        'root ::= "a"{5,2}',
        'root ::= "a"{1,99999}',
        "root ::= " + " | ".join(['"a"'] * 50_000),
        'root ::= "a"\0x',
        'root ::= "\ud800"',
    ],
)
def test_grammars_that_would_crash_the_parser_are_refused(engine, grammar):
    with pytest.raises(RequestError):
        engine.generate(Request(messages=CHAT, grammar=grammar))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 2.5},
        {"logprobs": 1.5},
        {"stop": (1,)},
        {"stop": "abc"},
        {"logit_bias": {1.5: 1.0}},
        {"temperature": "hot"},
        {"seed": 1.5},
        {"messages": (Message("user", "\ud800"),)},
        {"json_schema": "[" * 100_000},
    ],
)
def test_wrong_types_are_refused_by_the_call(engine, wrong):
    with pytest.raises(RequestError):
        engine.generate(replace(Request(messages=CHAT), **wrong))
    assert ask(engine, Request(messages=CHAT, max_tokens=2)).text
