"""The torch engine omits the layers that a depth decision skips (SPEC C7)."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaForCausalLM

from cogumi.core.types import Message, Request
from cogumi.engine.protocol import final_reply, replies
from cogumi.engine.torch import TorchEngine
from cogumi.models.tokenization import TOKENIZER_FILES
from support.engines import pico
from support.remote import CONTEXT

ASK = Request(messages=(Message("system", "Be short."), Message("user", "What is 48 plus 57?")), max_tokens=30)


def texts(engine, asks):
    return [(r.text, r.tokens, r.prompt) for r in replies(engine, asks)]


def test_depth_that_skips_no_layer_changes_nothing():
    """Bit for bit, in batches of prompts of several lengths, and with an adapter."""
    seen = []

    def all_layers(layer, hidden):
        seen.append((layer, hidden.shape[2]))
        return torch.ones(hidden.shape[:2], dtype=torch.bool)

    files = pico()
    plain = TorchEngine(files.base, adapters={"a": files.adapter}, context=CONTEXT)
    engine = TorchEngine(files.base, adapters={"a": files.adapter}, context=CONTEXT, depth=all_layers)
    asks = [replace(ASK, adapter=name) for name in (None, "a")] + [Request(prompt="Tom", max_tokens=9, echo=True)]
    assert texts(engine, asks) == texts(plain, asks)
    assert engine.read(ASK) == plain.read(ASK)
    assert set(seen) == {(0, 64), (1, 64)}


@pytest.mark.parametrize("skipped", [0, 1])
def test_layer_skipped_by_all_tokens_equals_a_removed_layer(skipped, tmp_path):
    files = pico()
    model = LlamaForCausalLM.from_pretrained(files.base)
    model.model.layers = torch.nn.ModuleList([layer for i, layer in enumerate(model.model.layers) if i != skipped])
    model.config.num_hidden_layers = 1
    model.save_pretrained(tmp_path)
    for name in TOKENIZER_FILES:
        shutil.copy(files.base / name, tmp_path)
    short = TorchEngine(tmp_path, context=CONTEXT)
    engine = TorchEngine(
        files.base, context=CONTEXT, depth=lambda i, hidden: torch.full(hidden.shape[:2], i != skipped)
    )
    assert engine.read(ASK).surprise == pytest.approx(short.read(ASK).surprise, abs=1e-4)
    one, two = (final_reply(each.generate(ASK)) for each in (engine, short))
    assert [token.id for token in one.tokens] == [token.id for token in two.tokens]
    assert [t.logprob for t in one.tokens] == pytest.approx([t.logprob for t in two.tokens], abs=1e-4)


def test_token_that_skips_every_layer_keeps_its_embedding():
    """Mixed masks: other tokens still attend to it, and their results differ from both extremes."""
    files = pico()
    first = TorchEngine(files.base, context=CONTEXT, depth=lambda i, hidden: torch.arange(hidden.shape[1])[None] > 0)
    none = TorchEngine(files.base, context=CONTEXT, depth=lambda i, hidden: torch.zeros(hidden.shape[:2]).bool())
    full = TorchEngine(files.base, context=CONTEXT)
    ask = Request(prompt="Tom is taller than Ann.")
    assert first.read(ask).surprise[0] == none.read(ask).surprise[0]
    assert first.read(ask).surprise[1:] != none.read(ask).surprise[1:]
    assert first.read(ask).surprise[1:] != full.read(ask).surprise[1:]
