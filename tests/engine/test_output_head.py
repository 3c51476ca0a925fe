"""Few-shot adaptation of the output head (SPEC C9): exact gradients, and no effect on other requests."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cogumi.core.errors import BundleError, ContextError, RequestError
from cogumi.core.types import Message, Request, Token
from cogumi.engine.few_shot import ADAPTER, in_context
from cogumi.engine.llama import output_head as head_module
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.llama.output_head import Head, LowRank, load_head
from cogumi.engine.protocol import final_reply, replies
from support.engines import ask, opened, pico
from support.output_head import IDS, WIDTH, low_rank, write_head
from support.waiting import Gate

SHOTS = (("What is 3 plus 4?", "It is 7."), ("What is 20 plus 1?", "It is 21."), ("Who is taller?", "Tom."))
ASK = Request(messages=(Message("system", "Be short."), Message("user", "What is 48 plus 57?")), max_tokens=20)
SHOWN = replace(ASK, examples=SHOTS)


def support(n, width=WIDTH, ids=IDS, seed=0):
    draw = np.random.default_rng(seed)
    hidden, logits = (draw.normal(0, 1, (n, size)).astype(np.float32) for size in (width, ids))
    return hidden, draw.integers(0, ids, n), logits


def nats(low, hidden, targets, logits):
    """Loss in double precision, by torch."""
    a, b, h, z = (torch.tensor(x, dtype=torch.float64) for x in (low.a, low.b, hidden, logits))
    a.requires_grad_(), b.requires_grad_()
    loss = torch.nn.functional.cross_entropy(z + low.scale * (h @ a.T) @ b.T, torch.tensor(targets))
    return loss, a, b


sizes = st.tuples(*(st.integers(1, top) for top in (9, 5, 7, 12)), st.integers(0, 1000))


@settings(max_examples=60, deadline=None)
@given(sizes)
def test_gradients_equal_autograd(drawn):
    n, rank, width, ids, seed = drawn
    low, given_support = low_rank(rank, width, ids, seed), support(n, width, ids, seed + 1)
    loss, a, b = nats(low, *given_support)
    loss.backward()
    of_a, of_b = low.gradients(*given_support)
    assert of_a.dtype == of_b.dtype == np.float32
    np.testing.assert_allclose(of_a, a.grad, atol=2e-6)
    np.testing.assert_allclose(of_b, b.grad, atol=2e-6)


@settings(max_examples=30, deadline=None)
@given(sizes)
def test_gradients_equal_finite_differences(drawn):
    n, rank, width, ids, seed = drawn
    low, given_support = low_rank(rank, width, ids, seed), support(n, width, ids, seed + 1)
    draw, eps = np.random.default_rng(seed), 1e-3
    to_a, to_b = (draw.normal(0, 1, x.shape).astype(np.float32) for x in (low.a, low.b))

    def moved(by):
        return nats(LowRank(low.a + by * to_a, low.b + by * to_b, low.scale), *given_support)[0].item()

    slope = (moved(eps) - moved(-eps)) / (2 * eps)
    of_a, of_b = low.gradients(*given_support)
    assert slope == pytest.approx(float((of_a * to_a).sum() + (of_b * to_b).sum()), abs=2e-3)


def test_gradients_do_not_depend_on_the_block_size(monkeypatch):
    low, given_support = low_rank(), support(50)
    whole = low.gradients(*given_support)
    monkeypatch.setattr(head_module, "BLOCK", 7 * IDS)
    for one, other in zip(whole, low.gradients(*given_support), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-7)


def test_adaptation_is_plain_gradient_descent(tmp_path):
    head, given_support = load_head(write_head(tmp_path / "h"), width=WIDTH, vocabulary=IDS), support(20)
    now = head.start
    for _ in range(3):
        loss, a, b = nats(now, *given_support)
        loss.backward()
        now = LowRank(*((x.detach() - 0.5 * x.grad).numpy().astype(np.float32) for x in (a, b)), now.scale)
    found = head.adapt(*given_support)
    np.testing.assert_allclose(found.a, now.a, atol=1e-5)
    np.testing.assert_allclose(found.b, now.b, atol=1e-5)
    before, after = (nats(low, *given_support)[0].item() for low in (head.start, found))
    assert after < before


def test_loaded_arrays_are_read_only(tmp_path):
    head = load_head(write_head(tmp_path / "h"), width=WIDTH, vocabulary=IDS)
    before = [x.tobytes() for x in (head.start.a, head.start.b)]
    head.adapt(*support(20))
    assert [x.tobytes() for x in (head.start.a, head.start.b)] == before
    for array in (head.start.a, head.start.b):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1.0


def test_invalid_head_file_is_refused(tmp_path):
    path, size = tmp_path / "head.safetensors", {"width": WIDTH, "vocabulary": IDS}
    start = low_rank()
    good = {"scale": "1", "lr": "0.1", "steps": "2", "base_sha256": "one"}
    for tensors, known, message in (
        ({"a": start.a}, good, "not a few-shot head"),
        ({"a": start.a, "b": start.b}, good | {"lr": "much"}, "not a few-shot head"),
        ({"a": start.a, "b": start.b}, {"scale": "1"}, "not a few-shot head"),
        ({"a": start.a[:3], "b": start.b}, good, "width 64"),
        ({"a": start.a, "b": start.b[:9]}, good, "width 64"),
        ({"a": start.a, "b": start.b}, good | {"lr": "0"}, "invalid numbers"),
        ({"a": start.a, "b": start.b}, good | {"steps": "100000"}, "invalid numbers"),
        ({"a": start.a * np.float32(np.inf), "b": start.b}, good, "invalid numbers"),
    ):
        save_file(tensors, path, metadata={"head": json.dumps(known)})
        with pytest.raises(BundleError, match=message):
            load_head(path, **size)
    save_file({"a": start.a, "b": start.b}, path, metadata={"head": json.dumps(good)})
    assert load_head(path, **size, base_sha256="one").steps == 2
    with pytest.raises(BundleError, match="another base"):
        load_head(path, **size, base_sha256="two")
    path.write_bytes(b"nothing")
    with pytest.raises(BundleError, match="not a few-shot head"):
        load_head(path, **size)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory):
    return write_head(tmp_path_factory.mktemp("head") / "head.safetensors")


@pytest.fixture(scope="module")
def engine(head_file):
    engine = opened(head=head_file, context=256)
    yield engine
    engine.close()


def by_torch(head, request, steps, folder):
    """The greedy ids and log-probabilities computed by transformers and autograd."""
    from transformers import AutoModelForCausalLM

    from cogumi.models.tokenization import HFTokenizer

    tokenizer, model = HFTokenizer.load(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    hidden, targets, logits = [], [], []

    @torch.inference_mode()
    def run(ids):
        out = model(torch.tensor([ids]), output_hidden_states=True)
        return out.hidden_states[-1][0].numpy(), out.logits[0].numpy()

    for question, answer in request.examples:
        prompt = tokenizer.chat((request.messages[0], Message("user", question)))
        answer_ids = tokenizer.answer(answer)
        states, z = run([*prompt, *answer_ids])
        hidden.append(states[len(prompt) - 1 : -1])
        logits.append(z[len(prompt) - 1 : -1])
        targets += answer_ids
    now = head.start
    for _ in range(steps):
        loss, a, b = nats(now, np.concatenate(hidden), targets, np.concatenate(logits))
        loss.backward()
        now = LowRank(*((x.detach() - head.lr * x.grad).numpy().astype(np.float32) for x in (a, b)), now.scale)
    ids, found = tokenizer.chat(request.messages), []
    for _ in range(request.max_tokens):
        states, z = run(ids)
        row = torch.log_softmax(torch.tensor(now.apply(z[-1], states[-1])), 0)
        ids.append(int(row.argmax()))
        found.append((ids[-1], float(row.max())))
        if ids[-1] == tokenizer.eos:
            break
    return found


def test_answers_equal_torch_with_a_head_adapted_by_autograd(head_file):
    """All in fp32; the head has enough effect that answers differ without it or without adaptation."""
    files, wanted = pico(), replace(SHOWN, max_tokens=8)
    engine = LlamaEngine(files.base_f32, threads=1, head=head_file, cache="f16")
    head = load_head(head_file, width=WIDTH, vocabulary=IDS)
    found = [(token.id, token.logprob) for token in ask(engine, wanted).tokens]
    expected = by_torch(head, wanted, head.steps, files.base)
    assert [i for i, _ in found] == [i for i, _ in expected]
    assert [p for _, p in found] == pytest.approx([p for _, p in expected], abs=0.02)
    unadapted = by_torch(head, wanted, 0, files.base)
    assert [p for _, p in found] != pytest.approx([p for _, p in unadapted], abs=0.1)
    engine.close()


def test_signals_are_computed_from_the_adapted_distribution(engine):
    reply = ask(engine, replace(SHOWN, logprobs=5))
    for token in reply.tokens:
        assert token.top[0][0] == token.id
        assert token.top[0][1] == pytest.approx(token.logprob, abs=1e-4)
        assert token.margin == pytest.approx(token.top[0][1] - token.top[1][1], abs=1e-4)
        assert token.draft_agreed is None
    assert reply.usage.drafted == 0
    assert [t.id for t in reply.tokens] != [t.id for t in ask(engine, ASK).tokens]


def test_adaptation_leaves_no_state_behind(engine):
    """The head's bytes and the answers with other examples, or with none, do not change."""
    low = engine._head.start
    before = low.a.tobytes() + low.b.tobytes()
    other = replace(SHOWN, examples=SHOTS[::-1][:2])
    plain, adapted, second = ask(engine, ASK), ask(engine, SHOWN), ask(engine, other)
    for _ in range(2):
        assert ask(engine, SHOWN).tokens == adapted.tokens
        assert ask(engine, other).tokens == second.tokens
        assert [(t.id, t.logprob) for t in ask(engine, ASK).tokens] == [(t.id, t.logprob) for t in plain.tokens]
    assert low.a.tobytes() + low.b.tobytes() == before
    assert adapted.tokens != second.tokens


def test_concurrent_requests_are_not_affected_by_adaptation(engine):
    others = [Request(prompt=f"{n} plus {n} is", max_tokens=25, logprobs=2, speculate=False) for n in range(9)]
    mixed = [one for i, other in enumerate(others) for one in (other, replace(SHOWN, seed=i, temperature=0.7))]
    alone = [ask(engine, one).tokens for one in mixed]
    assert [reply.tokens for reply in replies(engine, mixed)] == alone
    assert len({tuple(t.id for t in tokens) for tokens in alone[1::2]}) > 1


def test_cancellation_at_any_step_frees_the_slot(head_file, monkeypatch):
    gate = Gate(monkeypatch)
    engine = opened(head=head_file, slots=2, queue=30)
    expected = ask(engine, SHOWN).tokens
    for passes in range(12):  # while reading examples, while adapting the head, at the start of the answer
        gate.shut(after=passes)
        streams = [engine.generate(replace(SHOWN, max_tokens=200)) for _ in range(4)]
        gate.wait()
        for stream in streams:
            stream.close()
        gate.open()
        assert ask(engine, SHOWN).tokens == expected
    gate.shut(after=12)
    stream = engine.generate(replace(SHOWN, max_tokens=200))
    assert isinstance(next(stream), Token)
    gate.wait()
    engine._scheduler.stop()
    gate.open()
    engine.close()
    assert final_reply(stream).finish_reason == "cancelled"


def test_failed_batch_fails_its_adaptation(engine, monkeypatch):
    expected = ask(engine, SHOWN).tokens

    def fail(self, *given_support):
        raise RequestError("no")

    with monkeypatch.context() as patched:
        patched.setattr(Head, "step", fail)
        with pytest.raises(RequestError, match="no"):
            ask(engine, SHOWN)
    assert ask(engine, SHOWN).tokens == expected


def test_stop_seed_bias_hidden_states_and_length_with_adaptation(engine):
    whole = ask(engine, SHOWN)
    assert ask(engine, replace(SHOWN, stop=(whole.text[5:8],))).text == whole.text[: whole.text.index(whole.text[5:8])]
    wild = replace(SHOWN, temperature=1.0, seed=1)
    assert ask(engine, wild).tokens == ask(engine, wild).tokens != ask(engine, replace(wild, seed=2)).tokens
    forced = engine.tokenizer.encode("b")[0]
    assert ask(engine, replace(SHOWN, logit_bias={forced: 100.0}, max_tokens=4)).text == "bbbb"
    ids = (*engine.tokenizer.render(ASK), *(t.id for t in whole.tokens[:-1]))
    hidden = ask(engine, replace(SHOWN, hidden=True)).hidden
    assert hidden == pytest.approx(engine.read(Request(prompt=ids)).last, abs=1e-4)
    read = sum(len(engine.tokenizer.encode(q + a)) for q, a in SHOTS)
    assert whole.usage.prompt_tokens > len(engine.tokenizer.render(ASK)) + read


def test_without_adaptation_examples_become_earlier_turns(engine):
    bare = opened(context=256)
    for one in (bare, engine):
        found = ask(one, replace(SHOWN, adapt=False))
        assert found.text == ask(one, in_context(SHOWN)).text
        assert found.usage.prompt_tokens == len(one.tokenizer.render(in_context(SHOWN)))
        assert one.score(SHOWN, "It is 105.") == one.score(in_context(SHOWN), "It is 105.")
    assert ask(bare, SHOWN).text == found.text
    with pytest.raises(RequestError, match="no adaptable head"):
        bare.generate(replace(SHOWN, adapt=True))
    assert ask(engine, replace(SHOWN, adapt=True)).text == ask(engine, SHOWN).text
    bare.close()


def test_head_uses_its_own_adapter_which_is_not_listed_as_a_modifier(head_file, engine):
    files = pico()
    both = opened(head=head_file, adapters={"a": files.adapter_gguf, ADAPTER: files.adapter_gguf}, context=256)
    assert both.adapters == ("a",)
    with pytest.raises(RequestError, match="unknown adapter"):
        both.generate(replace(ASK, adapter=ADAPTER))
    assert ask(both, SHOWN).text == ask(engine, replace(SHOWN, adapter="a")).text != ask(engine, SHOWN).text
    assert ask(both, replace(SHOWN, adapt=False)).text == ask(engine, replace(SHOWN, adapt=False)).text
    both.close()


LONG = "word " * 400


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"speculate": True}, RequestError, "neither speculates nor echoes"),
        ({"echo": True}, RequestError, "neither speculates nor echoes"),
        ({"examples": (("a", LONG),)}, ContextError, "the context holds"),
        ({"examples": SHOTS * 4}, RequestError, "12 examples are too many"),
        ({"examples": (("a",),)}, RequestError, "example 0 is not a pair"),
        ({"examples": (*SHOTS, ("a", " "))}, RequestError, "example 3 has an empty"),
        ({"messages": (), "prompt": "a"}, RequestError, "give messages"),
        ({"examples": (), "adapt": True}, RequestError, "has no examples"),
    ],
)
def test_invalid_examples_are_refused_by_the_call(engine, wrong, error, message):
    with pytest.raises(error, match=message):
        engine.generate(replace(SHOWN, **wrong))


def test_too_many_example_answer_tokens_are_refused(engine, monkeypatch):
    monkeypatch.setattr("cogumi.engine.llama.engine.MAX_SUPPORT", 4 * IDS)
    with pytest.raises(ContextError, match="adapted to 4"):
        engine.generate(SHOWN)
