"""What the llama engine does beyond plain answers: reuse, rules, echo, drafts of every kind, adapters, failures."""

import json
import logging
import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.compress.gguf import export_model
from cogumi.errors import BundleError, ContextError, RequestError
from cogumi.runtime.engine import final_reply, replies
from cogumi.runtime.llama import Context, Grammar, Model
from cogumi.runtime.llama_engine import LlamaEngine
from cogumi.runtime.schema import NOT_KEPT, check_schema
from cogumi.types import Message, Request
from helpers_engines import pico
from pico import make_model

CHAT = (Message("system", "Be short."), Message("user", "What is 48 plus 57?"))


@pytest.fixture(scope="module")
def engine():
    files = pico()
    opened = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8, adapters={"a": files.adapter_gguf}, slots=4)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def bridged():
    """A base whose draft has another vocabulary."""
    opened = LlamaEngine(pico().base_q8, threads=1, draft=pico().other_q8, lookup=False, slots=4)
    yield opened
    opened.close()


def ids(n, seed=0):
    return tuple(np.random.default_rng(seed).integers(5, 512, n).tolist())


def ask(engine, request):
    return final_reply(engine.generate(request))


def plain(reply):
    """The tokens, without what only speculation says."""
    return [replace(token, draft_agreed=None) for token in reply.tokens]


# Prefix reuse (E1)


def test_a_conversation_is_read_once(engine):
    first = Request(prompt=ids(200, 1), max_tokens=20)
    reply = ask(engine, first)
    assert reply.usage.cached_tokens <= 1
    follow = Request(prompt=(*first.prompt, *(t.id for t in reply.tokens), *ids(30, 2)), max_tokens=20)
    warm = ask(engine, follow)
    assert warm.usage.cached_tokens == 219  # the last token of an answer has not been read yet
    again = ask(engine, follow)
    assert again.usage.cached_tokens == 249  # one token must be read to have its logits
    cold = LlamaEngine(pico().base_q8, threads=1, slots=1, lookup=False)
    assert plain(ask(cold, follow)) == plain(warm) == plain(again)
    cold.close()


def test_adapters_never_share_a_cache(engine):
    request = Request(prompt=ids(100, 3), max_tokens=12)
    ask(engine, request)
    adapted = ask(engine, replace(request, adapter="a"))
    assert adapted.usage.cached_tokens <= 1
    assert plain(ask(engine, replace(request, adapter="a"))) == plain(adapted)


def test_cancelled_and_measured_texts_leave_usable_caches(engine):
    request = Request(prompt=ids(150, 4), max_tokens=100)
    whole = ask(engine, request)
    stream = engine.generate(replace(request, prompt=(*request.prompt, 7)))
    next(stream)
    stream.close()
    score = engine.score(request, "It is 105.")
    assert engine.score(request, "It is 105.") == score
    assert plain(ask(engine, request)) == plain(whole)


def test_strangers_do_not_push_out_a_conversation(engine):
    talk = Request(prompt=ids(120, 5), max_tokens=5)
    ask(engine, talk)
    for seed in range(3):
        ask(engine, Request(prompt=ids(60, 50 + seed), max_tokens=3))
    assert ask(engine, talk).usage.cached_tokens == 119


# Reading ahead (E6)


def test_prefill_reads_while_the_user_types(engine):
    text = "Tom is taller than Ann. Ann is taller than Bob. "
    assert engine.prefill("s", text).result(20) == len(engine.tokenizer.encode(text)) - 0
    sent = Request(prompt=text + "Who is the tallest?", max_tokens=8, session="s")
    reply = ask(engine, sent)
    assert reply.usage.cached_tokens >= len(engine.tokenizer.encode(text)) - 2
    edited = text.replace("Bob", "Eve")
    engine.prefill("s", edited).result(20)
    assert (
        ask(engine, Request(prompt=edited, max_tokens=3)).usage.cached_tokens
        == len(engine.tokenizer.encode(edited)) - 1
    )
    with pytest.raises(ContextError):
        engine.prefill("s", text * 100)
    chat = Request(messages=CHAT)
    assert engine.prefill("s", chat).result(20) == len(engine.tokenizer.render(chat))


def test_a_new_text_of_a_session_takes_the_place_of_the_old():
    engine = LlamaEngine(pico().base_q8, threads=1, slots=1, context=4096, lookup=False)
    busy = engine.generate(Request(prompt="Tom", max_tokens=60))
    futures = [engine.prefill("s", Request(prompt=ids(2000, 6)[:n])) for n in range(500, 2001, 500)]
    cached = [future.result(30) for future in futures]
    assert cached[-1] == 2000
    assert cached[0] < 500  # was waiting and had not begun
    final_reply(busy)
    assert engine.free_slots == 1
    engine.close()


# Rules: bias, penalties, grammar (E1)


def test_bias_forces_and_forbids(engine):
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
def test_an_answer_keeps_to_its_schema(engine, temperature, speculate):
    for seed in range(8):
        request = Request(
            messages=CHAT, max_tokens=200, json_schema=SCHEMA, temperature=temperature, seed=seed, speculate=speculate
        )
        reply = ask(engine, request)
        assert reply.finish_reason == "stop"
        answer = json.loads(reply.text)
        assert answer["city"] in ("Paris", "Rome")
        assert answer["day"] in list("123456789")


def test_a_grammar_is_the_same_with_drafts(engine):
    request = Request(messages=CHAT, max_tokens=60, grammar='root ::= [a-z ]+ ("." | "!")', logit_bias={40: 3.0})
    one, two = (ask(engine, replace(request, speculate=x, frequency_penalty=0.5)) for x in (False, True))
    assert plain(one) == plain(two)
    assert two.usage.drafted > 0


@pytest.mark.parametrize(
    ("wrong", "says"),
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
def test_rules_that_mean_nothing_are_refused_by_the_call(engine, wrong, says):
    with pytest.raises(RequestError, match=says):
        engine.generate(replace(Request(messages=CHAT), **wrong))


def test_a_grammar_that_leaves_no_token_fails_its_request_only(engine, monkeypatch):
    other = engine.generate(Request(messages=CHAT, max_tokens=100))

    def nothing_left(self, logits):
        raise RequestError("the grammar allows no token of this vocabulary here; loosen it")

    monkeypatch.setattr(Grammar, "mask", nothing_left)
    stuck = engine.generate(Request(messages=CHAT, max_tokens=9, grammar='root ::= "a"', logit_bias={77: 50.0}))
    with pytest.raises(RequestError, match="allows no token"):
        final_reply(stuck)
    assert final_reply(other).finish_reason in ("stop", "length")


def test_what_a_grammar_forbids_cannot_be_accepted():
    """llama.cpp would end the process."""
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


@pytest.mark.parametrize("keyword", sorted(NOT_KEPT))
def test_what_no_grammar_keeps_to_is_refused_by_name(keyword):
    inner = {"type": "object", "properties": {"a": {"anyOf": [{"type": "string"}, {keyword: {}}]}}}
    with pytest.raises(RequestError, match=keyword):
        check_schema(json.dumps(inner))
    check_schema(json.dumps({"properties": {keyword: {"enum": [{keyword: 1}]}}}))  # a name, and a constant


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "maxLength": 20000},
        {"type": "array", "items": {"type": "integer"}, "maxItems": 20000},
        {"type": "array", "minItems": 2},
        {"type": "object", "required": ["a"]},
        {"type": "object", "properties": {"": {"type": "integer"}}},
        {"type": "object", "properties": {"a": True}},
        {"anyOf": [{"type": "string"}], "minLength": 3},
        {"type": ["string", "null"], "minLength": 3},
        {"type": "string", "format": "email"},
        {"type": "string", "pattern": "^]$"},
    ],
)
def test_schemas_that_would_be_broken_or_break_the_parser_are_refused(engine, schema):
    with pytest.raises(RequestError, match="cannot be held to"):
        engine.generate(Request(messages=CHAT, json_schema=json.dumps(schema)))


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
def test_grammars_that_would_break_the_parser_are_refused(engine, grammar):
    with pytest.raises(RequestError):
        engine.generate(Request(messages=CHAT, grammar=grammar))


def test_strings_of_a_schema_hold_no_raw_control_characters(engine):
    newline = engine.tokenizer.encode("\n")[0]
    request = Request(messages=CHAT, max_tokens=40, json_schema='{"type": "string", "maxLength": 8}')
    reply = ask(engine, replace(request, logit_bias={newline: 100.0}))
    assert isinstance(json.loads(reply.text), str)


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


def test_who_reads_ahead_waits_for_those_who_ask():
    engine = LlamaEngine(pico().base_q8, threads=1, slots=2, context=1024, lookup=False)
    ahead = [engine.prefill(f"s{i}", Request(prompt=ids(1000, i))) for i in range(60)]
    ask(engine, Request(prompt=ids(5, 99), max_tokens=2))
    assert not ahead[-1].done()
    assert not ahead[-1].cancel()
    assert ahead[-1].result(60) == 1000
    engine.close()


# Echo (E1, E7)


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


# Speculation (E2, E3)

prompts = st.lists(st.integers(5, 511), min_size=1, max_size=40).flatmap(
    lambda run: st.sampled_from([tuple(run), tuple(run * 3), (*run, 7, *run)])
)


@given(
    prompt=prompts,
    k=st.sampled_from([1, 2, 5, 12]),
    kind=st.sampled_from(["model", "ngram", "bridge"]),
    seed=st.sampled_from([0, 1]),
    penalty=st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=80, deadline=None)
def test_greedy_speculation_is_plain_whatever_drafts(prompt, k, kind, seed, penalty):
    """Over random models, prompts, numbers of drafted tokens and sources of drafts: the same bits (Q8_0)."""
    engine = engine_of(kind, k, seed)
    request = Request(prompt=prompt, max_tokens=20, speculate=False, logprobs=2, frequency_penalty=penalty)
    assert plain(ask(engine, replace(request, speculate=True))) == plain(ask(engine, request))


@cache
def random_base(seed):
    """A base like pico's with other weights; its adapter-free draft is pico's own, which agrees only by chance."""
    if seed == 0:
        return pico().base_q8
    folder = make_model(pico().base.parent / f"base-{seed}", seed=seed, layers=3)
    export_model(folder, folder.with_suffix(".gguf"), "q8_0")
    return folder.with_suffix(".gguf")


@cache
def engine_of(kind, k, seed=0):
    """An engine that drafts k tokens from one source only."""
    draft = {"model": pico().draft_q8, "ngram": None, "bridge": pico().other_q8}[kind]
    base = random_base(seed)
    return LlamaEngine(base, threads=1, draft=draft, draft_tokens=k, lookup=kind == "ngram", slots=2)


def test_every_source_drafts_and_is_sometimes_right():
    looping = Request(prompt=ids(5, 9) * 12, max_tokens=60, speculate=True)
    for kind in ("model", "ngram"):
        usage = ask(engine_of(kind, 5), looping).usage
        assert 0 < usage.accepted <= usage.drafted
    assert ask(engine_of("bridge", 5), looping).usage.drafted > 0


def test_a_sampled_answer_with_n_gram_drafts_has_the_same_distribution():
    """First token after a prompt whose lookup proposes a wrong and a right one: chi-square over many seeds."""
    from scipy import stats

    engine = engine_of("ngram", 5)
    repeat = ids(6, 10)
    requests = [
        Request(prompt=(*repeat, *repeat), max_tokens=2, temperature=0.4, top_p=0.5, seed=i, speculate=i % 2 == 0)
        for i in range(1200)
    ]
    pairs = [tuple(t.id for t in reply.tokens) for reply in replies(engine, requests)]
    common = [pair for pair in set(pairs) if pairs.count(pair) >= 12]
    assert len(common) >= 4
    table = [[pairs[kind::2].count(pair) for pair in common] for kind in (0, 1)]
    for row in table:
        row.append(600 - sum(row) + 1)
    assert stats.chi2_contingency(table).pvalue > 1e-4


def test_a_seed_gives_the_same_text_whatever_pays_at_the_moment():
    files = pico()
    engine = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8)
    for seed in range(4):
        request = Request(prompt=ids(5, 9) * 6, max_tokens=40, temperature=0.6, seed=seed)
        assert len({ask(engine, request).text for _ in range(6)}) == 1
        assert ask(engine, request).tokens == ask(engine, replace(request, speculate=False)).tokens
    engine.close()


def test_bridged_sampling_is_reproducible_and_exact_in_length(bridged):
    request = Request(messages=CHAT, max_tokens=30, temperature=0.8, seed=3, speculate=True)
    one, two = ask(bridged, request), ask(bridged, request)
    assert one.text == two.text
    assert one.usage.drafted > 0


def test_a_failing_draft_is_given_up_and_nobody_notices(monkeypatch, caplog):
    files = pico()
    engine = LlamaEngine(files.base_q8, threads=1, draft=files.draft_q8, lookup=False)
    request = Request(prompt=ids(20, 11), max_tokens=60, speculate=True)
    whole = ask(engine, replace(request, speculate=False))
    draft_weights = engine._draft.weights
    decode, calls = Context.decode, []

    def failing(self, rows):
        if self._weights is draft_weights:
            calls.append(rows)
            if len(calls) > 6:
                raise RequestError("llama.cpp could not run a batch")
        return decode(self, rows)

    monkeypatch.setattr(Context, "decode", failing)
    with caplog.at_level(logging.WARNING, "cogumi"):
        reply = ask(engine, request)
    assert plain(reply) == plain(whole)
    assert reply.usage.drafted > 0
    assert "answers go on without it" in caplog.text
    seen = len(calls)
    assert plain(ask(engine, request)) == plain(whole)
    assert len(calls) == seen
    engine.close()


def test_a_failing_batch_takes_only_its_own_jobs_with_it(monkeypatch):
    engine = LlamaEngine(pico().base_q8, threads=1, adapters={"a": pico().adapter_gguf}, lookup=False)
    request = Request(prompt=ids(20, 12), max_tokens=100)
    whole, adapted = ask(engine, request), ask(engine, replace(request, adapter="a"))
    decode = Context.decode

    def failing(self, rows):
        if any(666 in row.tokens for row in rows):
            raise RequestError("llama.cpp could not run a batch")
        return decode(self, [row._replace(tokens=[t % 512 for t in row.tokens]) for row in rows])

    monkeypatch.setattr(Context, "decode", failing)
    monkeypatch.setattr(type(engine.tokenizer), "render", lambda self, request: list(request.prompt))
    other = engine.generate(replace(request, adapter="a"))
    with pytest.raises(RequestError, match="could not run"):
        ask(engine, Request(prompt=(666, 7), max_tokens=5))
    assert final_reply(other).tokens == adapted.tokens
    assert ask(engine, request).tokens == whole.tokens
    engine.close()


def test_a_draft_that_cannot_be_bridged_is_refused_with_the_reason(tmp_path):
    from cogumi.runtime.bridge import Bridge

    class Lossy(type(Model(pico().base_q8).tokenizer)):
        pass

    tokenizer = Model(pico().other_q8).tokenizer
    encode = tokenizer.encode
    tokenizer.encode = lambda text, special=False: encode(text.lower(), special)
    with pytest.raises(BundleError, match="text"):
        Bridge(Model(pico().base_q8).tokenizer, tokenizer)


# Adapters (E8)


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
    stream = engine.generate(replace(request, max_tokens=400))
    next(stream)
    with pytest.raises(RequestError, match="answering just now"):
        engine.add_adapter("late", files.adapter_gguf)
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


def test_no_adapter_is_the_base_bit_for_bit(engine):
    bare = LlamaEngine(pico().base_q8, threads=1, lookup=False)
    for seed in range(5):
        request = Request(prompt=ids(30, 20 + seed), max_tokens=20, logprobs=3)
        ask(engine, replace(request, adapter="a"))
        assert plain(ask(engine, request)) == plain(ask(bare, request))
    bare.close()


# Cache types (D8)


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


# K-quants


def test_at_k_quants_what_is_emitted_is_what_the_base_says():
    """Kernels round by batch size there, so near ties may flip against plain decoding; few do."""
    folder = make_model(pico().base.parent / "wide", hidden=256, seed=3)
    export_model(folder, folder.with_suffix(".gguf"), "q4_k_m")
    engine = LlamaEngine(folder.with_suffix(".gguf"), threads=1, draft=folder.with_suffix(".gguf"), lookup=False)
    flipped = total = 0
    for seed in range(20):
        request = Request(prompt=ids(40, 300 + seed), max_tokens=20, logprobs=1, speculate=False)
        one, two = (ask(engine, replace(request, speculate=x)).tokens for x in (False, True))
        assert all(token.top[0][0] == token.id for token in (*one, *two))
        same = [a.id == b.id for a, b in zip(one, two, strict=False)]
        total += same.index(False) + 1 if False in same else len(same)
        flipped += False in same
    print(f"{flipped} flips in {total} tokens")
    assert flipped <= total / 50
    engine.close()


@pytest.mark.parametrize("size", [{"slots": 0}, {"context": 0}, {"draft_tokens": -1}])
def test_sizes_that_mean_nothing_are_refused(size):
    with pytest.raises(BundleError, match="at least 1"):
        LlamaEngine(pico().base_q8, **size)


def test_weights_go_with_their_engine():
    engine = LlamaEngine(pico().base_q8, threads=1)
    ask(engine, Request(prompt="Tom", max_tokens=3))
    weights = weakref.ref(engine._model.weights)
    engine.close()
    del engine
    assert weights() is None
