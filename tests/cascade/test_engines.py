"""Cascades with engines from a factory: their answers, and the missing capabilities they report."""

import contextlib

import numpy as np
import pytest

from cogumi.cascade.engines import Engines, llama_engines
from cogumi.cascade.opening import open_cascade
from cogumi.confidence.nets import Net
from cogumi.core.errors import BundleError, RequestError
from cogumi.core.types import Decision, Message, Request, Revision, Token
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import Capability, final_reply
from cogumi.engine.remote import RemoteEngine
from cogumi.engine.torch import TorchEngine
from support.bundle import QuestionGate, calibrated, cascade_of, make_bundle
from support.pico import make_model
from support.remote import our_server

SIZE = {"slots": 2, "context": 128, "threads": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pico models as folders for torch, and a bundle of them."""
    root = tmp_path_factory.mktemp("engines")
    make_bundle(root)
    return root


@pytest.fixture(scope="module")
def remote(folder, tmp_path_factory):
    """Opens a cascade with a base on our server, with or without the bundle's own draft."""
    with our_server(folder / "bundle", tmp_path_factory.mktemp("server")) as url:

        def engines(with_draft):
            def opened(files, options):
                base = RemoteEngine(
                    url, "cogumi:base", tokenizer=files.bundle.base, adapters={"code": "cogumi:base+code"}
                )
                return Engines(base, LlamaEngine(files.bundle.draft, lookup=False, **SIZE) if with_draft else None)

            return opened

        yield engines


def torch_engines(folder, **options):
    return lambda files, _: Engines(TorchEngine(folder, context=128, **options), None)


def ask(text="What is 2 + 3?", **values):
    return Request(messages=(Message("user", text),), **{"max_tokens": 10, **values})


def test_default_factory_has_all_capabilities(folder):
    with contextlib.closing(open_cascade(folder / "bundle", **SIZE)) as cascade:
        assert cascade.missing == ()
        own = {Capability.SPECULATION, Capability.PREFILL, Capability.RUNTIME_ADAPTERS, Capability.HEAD_ADAPTATION}
        assert cascade.capabilities == set(Capability) - own
        assert final_reply(cascade.generate(ask(mode="fast"))).accepted


@pytest.mark.parametrize("with_draft", [False, True])
@pytest.mark.parametrize("mode", [None, "accurate", "mobile"])
def test_remote_base_answers_and_reports_why_it_is_never_accepted(folder, remote, with_draft, mode):
    with contextlib.closing(open_cascade(folder / "bundle", engines=remote(with_draft), **SIZE)) as cascade:
        events = list(cascade.generate(ask(mode=mode)))
        reply = events[-1]
        alone = final_reply(cascade.tiers.base.generate(ask()))
        assert reply.text == alone.text
        assert (reply.tier, reply.route, reply.p_correct, reply.accepted) == ("base", "low_confidence", None, False)
        assert [e.text for e in events if isinstance(e, Token)] == [t.text for t in alone.tokens]
        assert not any(isinstance(e, Revision) for e in events)
        why = next(e for e in events if isinstance(e, Decision))
        assert (why.tier, why.signal, why.accepted) == ("cascade", "calibrated", False)
        assert "the base (RemoteEngine) has no " in why.reason
        assert why.reason.endswith("whole distributions, which the gates need, so no answer is accepted")
        assert "\n" not in why.reason
        assert cascade.missing[0].startswith(why.reason)
        assert cascade.missing[1:] == (
            "the base (RemoteEngine) has no speculation: it generates token by token",
            "the base (RemoteEngine) has no prefill: a modifier is loaded at its first request",
        )
        named = final_reply(cascade.generate(ask(adapter="code")))
        assert (named.tier, named.accepted) == ("modifier:code", False)
        assert final_reply(cascade.generate(ask(abstain=True))).route == "abstained"
        assert cascade.score(ask(), "five").greedy is False


def test_torch_base_answers_and_uses_its_own_signals(folder):
    adapters = {name: folder / name for name in ("code", "math")}
    engines = torch_engines(folder / "base", adapters=adapters)
    with contextlib.closing(open_cascade(folder / "bundle", engines=engines)) as cascade:
        assert [line.partition(":")[0] for line in cascade.missing] == [
            "the base (TorchEngine) has no speculation",
            "the base (TorchEngine) has no prefill",
        ]
        sure = final_reply(cascade.generate(ask(mode="fast")))
        assert (sure.route, sure.accepted, sure.p_correct) == ("base", True, pytest.approx(0.7))
        asked = final_reply(cascade.generate(ask(mode="balanced")))
        assert {d.tier for d in asked.decisions if d.signal == "p_correct"} >= {"base", "modifier:code"}
        with pytest.raises(RequestError, match="TorchEngine has no grammars; ask another engine"):
            cascade.generate(ask(grammar='root ::= "a"'))


def test_base_without_modifiers_is_reported(folder):
    with contextlib.closing(open_cascade(folder / "bundle", engines=torch_engines(folder / "base"))) as cascade:
        assert cascade.missing[0] == "the base has no modifiers: only the base answers"
        assert final_reply(cascade.generate(ask())).tier == "base"


def test_heads_of_another_model_are_refused(folder, tmp_path):
    engines = torch_engines(make_model(tmp_path / "other", hidden=128, vocab=400, seed=5))
    cascade = open_cascade(folder / "bundle", engines=engines)
    with pytest.raises(RequestError, match="hidden states of 128 numbers, the bundle's heads need 64: open"):
        final_reply(cascade.generate(ask()))
    cascade.close()


class WithoutHiddenStates:
    """A llama engine that declares no hidden states."""

    def __init__(self, engine):
        self._engine, self.capabilities = engine, engine.capabilities - {Capability.HIDDEN_STATES}

    def __getattr__(self, name):
        return getattr(self._engine, name)


def test_hidden_states_are_needed_only_for_probes(folder):
    def engines(files, options):
        base, draft = llama_engines(files, options)
        return Engines(WithoutHiddenStates(base), draft)

    with contextlib.closing(open_cascade(folder / "bundle", engines=engines, **SIZE)) as cascade:
        assert cascade.missing == ()
        assert final_reply(cascade.generate(ask(mode="fast"))).accepted
        probe = Net.of(np.zeros(64), np.ones(64), [np.zeros((64, 1))], [[0.0]])
        known = calibrated(dict.fromkeys(("draft", "base", "modifier", "direct"), 0.9), 0.5, QuestionGate(1e9, 0.5))
        object.__setattr__(known, "probe", probe)
        reply = final_reply(cascade_of(cascade.tiers, known).generate(ask(mode="fast")))
        assert (reply.accepted, reply.p_correct) == (False, None)
        assert "the base (WithoutHiddenStates) has no hidden states, which the gates need" in reply.decisions[0].reason


def test_closed_cascade_refuses_every_call(folder):
    cascade = open_cascade(folder / "bundle", **SIZE)
    cascade.close()
    for call in (
        lambda: cascade.generate(ask()),
        lambda: cascade.generate(ask(adapter="code")),
        lambda: cascade.score(ask(), "five"),
        lambda: cascade.read(ask()),
        lambda: cascade.embed(["a"]),
        lambda: cascade.feedback("id", True, "ann"),
        lambda: cascade.check(ask()),
    ):
        with pytest.raises(RequestError, match=r"^this cascade is closed: open it again$"):
            call()
    cascade.close()


REMEDY = "name a bundle, a GGUF file or a model folder, or build one: cogumi build"


def test_path_that_is_not_a_bundle_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for path, words in (
        (tmp_path / "nowhere", f"does not exist: {REMEDY}"),
        (file, f"is neither a bundle nor a GGUF file: {REMEDY}"),
        (tmp_path, "is not a bundle: it has no bundle.json; build one: cogumi build"),
    ):
        with pytest.raises(BundleError) as refused:
            open_cascade(path)
        assert str(refused.value) == f"{path} {words}"
