"""Modifiers added to a running cascade (SPEC E8): selected by name, never accepted, restored after a restart."""

import json
import shutil
import warnings
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from cogumi.cascade.added_modifiers import FILE, add_modifier
from cogumi.cascade.engines import Engines
from cogumi.cascade.modes import Settings
from cogumi.cascade.opening import open_cascade
from cogumi.compress.gguf.export import export_adapter
from cogumi.confidence.gate import QuestionGate
from cogumi.confidence.nets import Net
from cogumi.core.errors import BundleError, RequestError, StateError
from cogumi.core.types import Request
from cogumi.engine.torch import TorchEngine
from support.bundle import HIDDEN, calibrated, cascade_of, make_bundle, open_tiers
from support.engines import pico
from support.pico import make_adapter

SIZE = {"threads": 1, "slots": 2, "context": 128}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with `bundle`, and `law.gguf`, a modifier of its base that is not in the bundle."""
    root = tmp_path_factory.mktemp("added")
    make_bundle(root)
    export_adapter(make_adapter(root / "law", root / "base", seed=9), root / "base", root / "law.gguf")
    return root


@pytest.fixture
def law(made, tmp_path):
    return shutil.copy(made / "law.gguf", tmp_path / "law.gguf")


def ask(bot, **options):
    return bot.ask("What is 2 + 3?", max_tokens=10, **options)


def restarted(bundle, state):
    """The modifiers of a reopened cascade, and its warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with open_cascade(bundle, state=state, **SIZE) as bot:
            assert ask(bot).text
            return bot.adapters, [str(warning.message) for warning in told]


def test_added_modifier_is_available_at_once_and_after_a_restart(made, law, tmp_path):
    state = tmp_path / "state"
    with open_cascade(made / "bundle", state=state, **SIZE) as bot:
        bot.add_modifier("law", str(law))
        assert bot.models["cogumi:base+law"] == "modifier"
        engine, request = bot.resolve("cogumi:base+law", Request())
        assert (engine, request.adapter) == (bot.tiers.base, "law")
        reply = ask(bot, adapter="law")
        assert (reply.tier, reply.accepted) == ("modifier:law", False)
        assert reply.text != ask(bot, adapter="code").text
        with pytest.raises(RequestError, match="the modifier name 'law' is already in use"):
            bot.add_modifier("law", law)
        with pytest.raises(RequestError, match="the modifier name 'code' is already in use"):
            bot.add_modifier("code", law)
    with open_cascade(made / "bundle", state=state, **SIZE) as again:
        assert again.adapters == ("code", "math", "law")
        assert ask(again, adapter="law").text == reply.text
    with open_cascade(made / "bundle", **SIZE) as without:
        assert without.adapters == ("code", "math")


def test_missing_or_changed_file_is_omitted_with_a_warning(made, law, tmp_path):
    state = tmp_path / "state"
    with open_cascade(made / "bundle", state=state, **SIZE) as bot:
        bot.add_modifier("law", law)
    assert restarted(made / "bundle", state) == (("code", "math", "law"), [])
    whole = law.read_bytes()
    law.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    names, (told,) = restarted(made / "bundle", state)
    assert names == ("code", "math")
    assert "the earlier added modifier 'law' is skipped" in told
    assert "law.gguf has changed" in told
    law.unlink()
    names, (told,) = restarted(made / "bundle", state)
    assert names == ("code", "math")
    assert "law.gguf is missing" in told
    assert "\n" not in told
    law.write_bytes(whole)
    assert restarted(made / "bundle", state) == (("code", "math", "law"), [])


def test_modifier_of_a_newer_bundle_takes_precedence(made, law, tmp_path):
    state = tmp_path / "state"
    with open_cascade(made / "bundle", state=state, **SIZE) as bot:
        bot.add_modifier("law", law)
    known = json.loads((state / FILE).read_text())
    known["modifiers"]["code"] = known["modifiers"].pop("law")
    (state / FILE).write_text(json.dumps(known))
    names, (told,) = restarted(made / "bundle", state)
    assert names == ("code", "math")
    assert "the modifier name 'code' is already in use" in told


@pytest.mark.parametrize("text", ["[1]", "{", '{"modifiers": {"law": 5}}', '{"x": 1}'])
def test_invalid_list_of_added_modifiers_is_refused(made, tmp_path, text):
    (tmp_path / FILE).write_text(text)
    with pytest.raises(
        StateError, match=r"modifiers\.json is not a list of modifiers .*delete it and add the modifiers again"
    ):
        open_cascade(made / "bundle", state=tmp_path, **SIZE)


def test_failed_addition_changes_nothing(made, law, tmp_path):
    with open_cascade(made / "bundle", state=tmp_path / "state", **SIZE) as bot:
        with pytest.raises(BundleError, match=r"is not an adapter for base\.gguf .*use one trained on it"):
            bot.add_modifier("other", pico().other_adapter_gguf)
        with pytest.raises(BundleError, match="does not exist"):
            bot.add_modifier("gone", tmp_path / "gone.gguf")
        for name in ("", ".fewshot", "../x", "a b", "a+b", "x" * 101):
            with pytest.raises(RequestError, match="is not a valid modifier name: use up to 100 letters"):
                bot.add_modifier(name, law)
        assert bot.adapters == ("code", "math")
        assert not (tmp_path / "state" / FILE).exists()
    with pytest.raises(RequestError, match="closed"):
        bot.add_modifier("law", law)


def test_modifier_that_cannot_be_persisted_is_available_until_close(made, law, tmp_path):
    with open_cascade(made / "bundle", state=tmp_path / "state", **SIZE) as bot:
        (tmp_path / "state" / f"{FILE}.part").mkdir()
        with pytest.raises(StateError, match=r"'law' was added only until the cascade closes: .* cannot be written"):
            bot.add_modifier("law", law)
        assert ask(bot, adapter="law").tier == "modifier:law"


def test_engine_without_runtime_adapters_is_reported(made, law, tmp_path):
    with open_cascade(made / "bundle", state=tmp_path / "state", **SIZE) as bot:
        bot.add_modifier("law", law)

    def engines(files, options):
        return Engines(TorchEngine(made / "base", context=128), None)

    with pytest.warns(UserWarning, match="'law' is skipped: TorchEngine has no adapters at run"):
        bot = open_cascade(made / "bundle", engines=engines, state=tmp_path / "state")
    with closing(bot), pytest.raises(RequestError, match="TorchEngine has no adapters at run time"):
        bot.add_modifier("law", law)


@pytest.mark.parametrize("mode", ["balanced", "straight", "accurate", "mobile", "turbo", "desktop"])
def test_modifier_named_like_a_router_domain_is_never_accepted(made, law, mode):
    """The router has a domain `law`, but the gates were fitted without its modifier."""
    router = Net.of(
        np.zeros(2 * HIDDEN),
        np.ones(2 * HIDDEN),
        [np.zeros((2 * HIDDEN, 3))],
        [[0.0, 0.0, 9.0]],
        ("base", "code", "law"),
    )
    opened = open_tiers(made / "bundle", 2, 128)
    with closing(opened):
        add_modifier(opened.base, "law", law, None)
        gates = {"draft": 0.1, "base": 0.1, "modifier": 0.99, "direct": 0.99}
        whole = calibrated(gates, 0.5, QuestionGate(1e9, 0.5, base_perplexity=0.0))
        for known, sure in ((("code", "math"), False), (("code", "math", "law"), True)):
            tiers = replace(opened, heads=replace(opened.heads, router=router), calibrated=frozenset(known))
            bot = cascade_of(tiers, whole, settings=Settings(files={".law": "law"}))
            for files in ((), ("contract.law",)):
                reply = ask(bot, mode=mode, files=files)
                assert sure or not any("law" in decision.tier for decision in reply.decisions)
                assert reply.accepted == (sure and mode != "turbo")
            assert not ask(bot, adapter="law").accepted


def test_idle_modifiers_beyond_the_budget_are_unloaded(made):
    with open_cascade(made / "bundle", adapter_memory=1, **SIZE) as bot:
        told = {name: ask(bot, adapter=name).text for name in ("code", "math")}
        assert bot.tiers.base._adapters.loaded == ("math",)
        assert ask(bot, adapter="code").text == told["code"]
