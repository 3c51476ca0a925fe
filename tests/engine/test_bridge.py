"""The token bridge between vocabularies: text is preserved exactly, and answers of the base do not change."""

from __future__ import annotations

import codecs
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import BundleError
from cogumi.core.types import Message, Request
from cogumi.engine.llama.binding.context import Context, Row
from cogumi.engine.llama.binding.model import Model, load_tokenizer
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.speculative.bridge import TAIL, Bridge
from support.gguf import CODE, EMOJI, MULTILINGUAL
from support.pico import SENTENCES, make_model, make_tokenizer
from support.public_data import public_data

PICO = ["pico-512", "pico-330"]
REAL = ["gpt-2", "falcon", "starcoder", "deepseek-llm", "deepseek-coder", "llama-spm", "phi-3"]
PAIRS = [(PICO[i], PICO[1 - i]) for i in (0, 1)] + [(base, draft) for base in REAL for draft in REAL if base != draft]
PROMPT = Request(prompt="Q: ")

pairs = pytest.mark.parametrize("names", PAIRS, ids="<-".join)
some_pairs = pytest.mark.parametrize("names", PAIRS[:2] + PAIRS[2::5], ids="<-".join)
texts = st.one_of(
    st.text(max_size=60), st.lists(st.sampled_from(MULTILINGUAL + CODE + EMOJI + SENTENCES), max_size=3).map(" ".join)
)


@cache
def memorising_model(vocab: int) -> Path:
    """A pico model that memorised the pico sentences, as GGUF; takes about two seconds."""
    folder = make_model(Path(mkdtemp(prefix="cogumi-reciting-")) / "model", vocab=vocab, seed=vocab, scale=0.05)
    tokenizer = make_tokenizer(folder, vocab)
    model = LlamaForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = [torch.tensor([tokenizer.encode(f"{s}<|end|>").ids]) for s in SENTENCES]
    for _ in range(40):
        for ids in rows:
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    model.save_pretrained(folder)
    export_model(folder, folder.with_suffix(".gguf"))
    return folder.with_suffix(".gguf")


@cache
def tokenizer(name: str) -> Tokenizer:
    if name in PICO:
        return load_tokenizer(memorising_model(int(name.removeprefix("pico-"))))
    return load_tokenizer(public_data(f"tokenizers_llamacpp/ggml-vocab-{name}.gguf"))


@cache
def bridge(base: str, draft: str) -> Bridge:
    return Bridge(tokenizer(base), tokenizer(draft))


class Changed:
    """A tokenizer with some attributes replaced."""

    def __init__(self, inner: Tokenizer, **changes) -> None:
        self.inner = inner
        self.__dict__ |= changes

    def __getattr__(self, name):
        return getattr(self.inner, name)


def encoded(name: str, text: str) -> list[int]:
    """The ids that a model would generate for `text`: without SentencePiece's leading space."""
    t = tokenizer(name)
    if name in ("llama-spm", "phi-3"):
        return t.encode("\n" + text)[len(t.encode("\n")) :]
    return t.encode(text)


def spelled(t: Tokenizer, ids: list[int]) -> bytes:
    return b"".join(map(t.piece, ids))


@cache
def kept_by(name: str, character: str) -> bytes:
    """A character after encoding and decoding; a few vocabularies lack bytes of unassigned characters."""
    return spelled(tokenizer(name), encoded(name, character))


def check_ids(built: Bridge, base: Tokenizer, draft: Tokenizer, ids: list[int], kept=str.encode) -> None:
    """Append `ids` one by one: the draft must read the text so far, and only the end of its ids may change."""
    text = built.text(PROMPT, base.encode("Q: "))
    prompt = list(text.ids)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    whole, before = b"", prompt
    for id in ids:
        text.append(id)
        whole += b"".join(map(kept, decoder.decode(base.piece(id))))
        now = list(text.ids)
        assert spelled(draft, now[len(prompt) :]) == whole
        stable = max(len(before) - 2 * TAIL, len(prompt))
        assert now[:stable] == before[:stable]
        before = now


@some_pairs
@settings(deadline=None, max_examples=15)
@given(st.data())
def test_draft_reads_exactly_the_settled_text(names, data):
    built, (base, draft) = bridge(*names), map(tokenizer, names)
    anything = st.lists(st.integers(0, base.size - 1), max_size=50)
    ids = data.draw(st.one_of(anything, texts.map(lambda text: encoded(names[0], text))))
    check_ids(built, base, draft, ids, kept=partial(kept_by, names[1]))


@pairs
def test_incremental_encoding_of_a_long_text_equals_full_encoding(names):
    long = " ".join(MULTILINGUAL + CODE + SENTENCES + EMOJI)
    text = bridge(*names).text(PROMPT, tokenizer(names[0]).encode("Q: "))
    prompt = len(text.ids)
    for i, id in enumerate(encoded(names[0], long)):
        text.append(id)
        if i % 5 == 0:
            _ = text.ids
    assert text.ids[prompt:] == encoded(names[1], long)


@some_pairs
@settings(deadline=None, max_examples=25)
@given(st.data())
def test_translation_is_a_prefix_of_the_drafted_text(names, data):
    built, (base, draft) = bridge(*names), map(tokenizer, names)
    text = built.text(PROMPT, base.encode("Q: "))
    settled = encoded(names[0], data.draw(texts))
    settled = settled[: data.draw(st.integers(0, len(settled)))]
    settled += data.draw(st.lists(st.integers(0, base.size - 1), max_size=3))
    for id in settled:
        text.append(id)
    drafted = encoded(names[1], data.draw(texts))
    drafted = drafted[: data.draw(st.integers(0, len(drafted)))]
    drafted += data.draw(st.lists(st.integers(0, draft.size - 1) | st.just(draft.eos), max_size=3))
    new = text.translate(drafted)
    shown = codecs.getincrementaldecoder("utf-8")("replace")
    shown.decode(spelled(base, settled))
    held = shown.getstate()[0]
    if new and new[-1] in base.ends:
        end = next(i for i, id in enumerate(drafted) if id in draft.ends)
        assert held + spelled(base, new[:-1]) == spelled(draft, drafted[:end])
        new = new[:-1]
    assert spelled(draft, drafted).startswith(held + spelled(base, new)) or not new
    assert not base.ends.intersection(new)


@pairs
def test_correct_draft_is_translated_to_the_ids_of_the_base(names):
    """Also when the draft starts in the middle of a character or a word."""
    built, (base, draft) = bridge(*names), map(tokenizer, names)
    exact = total = 0
    for line in MULTILINGUAL + CODE + SENTENCES + EMOJI:
        ids = encoded(names[0], line)
        text = built.text(PROMPT, base.encode("Q: "))
        for i, id in enumerate(ids):
            if i % 5 == 0:
                read = spelled(base, ids[:i]).decode("utf-8", "ignore")
                new = text.translate([*encoded(names[1], line.removeprefix(read)), draft.eos])
                assert spelled(base, ids).startswith(spelled(base, ids[:i] + new)), "not the text that follows"
                exact += new == [*ids[i:], base.eos]
                total += 1
            text.append(id)
    print(f"{names}: {exact} of {total} continuations came out exactly as the base writes them")
    assert exact / total > 0.9


def test_end_token_is_translated_only_after_complete_characters():
    built, (base, draft) = bridge(*PICO), map(tokenizer, PICO)
    text = built.text(PROMPT, base.encode("Q: "))
    euro = draft.encode("€")
    other = next(i for i in range(draft.size) if not draft.piece(i) and i not in draft.ends)
    assert len(euro) > 1
    assert text.translate([draft.eos, *euro]) == [base.eos]
    assert text.translate([*euro, draft.eos, *euro]) == [*base.encode("€"), base.eos]
    assert text.translate([*draft.encode("it"), *euro[:-1], draft.eos]) == base.encode("it")
    assert text.translate([*draft.encode("it"), other, *euro]) == base.encode("it")
    assert text.translate([]) == text.translate([other]) == text.translate(euro[:1]) == []


def test_character_begun_by_the_base_is_completed():
    built, (base, draft) = bridge(*PICO), map(tokenizer, PICO)
    first, *rest = base.encode("€")
    text = built.text(PROMPT, base.encode("Q: "))
    prompt = list(text.ids)
    text.append(first)
    assert text.ids == prompt
    assert text.translate(draft.encode("€ 5")) == rest + base.encode(" 5")
    assert text.translate(draft.encode("five")) == text.translate([draft.eos]) == []


def test_draft_reads_its_own_chat_template_or_the_raw_text():
    built, (base, draft) = bridge(*PICO), map(tokenizer, PICO)
    chat = Request(messages=(Message("user", "What is 48 plus 57?"),))
    assert built.prompt(chat, base.render(chat)) == draft.render(chat)
    assert built.prompt(Request(prompt="Tom is"), base.encode("Tom is")) == draft.encode("Tom is")
    few, many = draft.encode("dagefi lomu"), base.encode("dagefi lomu")
    assert few != many, "ids of the smaller vocabulary mean something in the larger one too"
    assert bridge(*PICO[::-1]).prompt(Request(prompt=tuple(few)), few) == many
    assert built.prompt(Request(prompt=""), []) == [draft.eos]
    for template in (None, "{{ raise_exception('no such role') }}"):
        plain = load_tokenizer(memorising_model(330))
        plain.template = template
        assert Bridge(base, plain).prompt(chat, base.render(chat)) == draft.encode("What is 48 plus 57?")


def test_tokens_the_base_cannot_encode_are_dropped():
    inner, draft = map(tokenizer, PICO)
    base = Changed(inner, encode=lambda text, special=False: inner.encode(text.replace("ç", "c")))
    text = Bridge(base, draft).text(PROMPT, [])
    assert text.translate([*draft.encode("un garçon"), draft.eos]) == inner.encode("un gar")
    assert text.translate([*draft.encode("un gar"), draft.eos]) == [*inner.encode("un gar"), inner.eos]


@settings(deadline=None, max_examples=30)
@given(texts)
def test_leading_space_added_by_the_tokenizer_is_removed(answer):
    base, inner = map(tokenizer, PICO)
    spaced = Changed(inner, encode=lambda text, special=False: inner.encode(" " + text))
    check_ids(Bridge(base, spaced), base, spaced, base.encode(answer))
    new = Bridge(spaced, base).text(PROMPT, []).translate(base.encode(answer))
    assert spelled(spaced, new) == answer.encode()


def test_only_the_end_of_the_text_is_re_encoded():
    base, inner = map(tokenizer, PICO)
    sizes = []

    def length_dependent_ids(text: str, special: bool = False) -> list[int]:
        """Ids that depend on the length of the text, so that there are few safe split points."""
        sizes.append(len(text))
        return [i * 97 + len(text) % 97 for i in text.encode()]

    piece = {i * 97 + j: bytes([i]) for i in range(256) for j in range(97)}.__getitem__
    for draft in (
        Changed(inner, encode=lambda text: sizes.append(len(text)) or inner.encode(text)),
        Changed(inner, encode=length_dependent_ids, piece=piece),
    ):
        built = Bridge(base, draft)
        sizes.clear()
        check_ids(built, base, draft, base.encode("The fox, 123 foxes and 日本語. " * 20))
        assert max(sizes) < 12 * TAIL


def test_lossy_vocabularies_and_those_without_an_end_are_refused():
    base, draft = map(tokenizer, PICO)
    lower = Changed(draft, encode=lambda text: draft.encode(text.lower()))
    with pytest.raises(BundleError, match=r"draft's tokenizer does not round-trip text.*becomes .the quick brown"):
        Bridge(base, lower)
    with pytest.raises(BundleError, match="base's tokenizer does not round-trip text"):
        Bridge(lower, draft)
    with pytest.raises(BundleError, match="draft's tokenizer has no end-of-answer token"):
        Bridge(base, Changed(draft, eos=-1))


def test_vocabulary_of_an_embedding_model_is_refused_at_load():
    path = public_data("tokenizers_llamacpp/ggml-vocab-bert-bge.gguf")
    with pytest.raises(BundleError, match=r"is an embedding model \(bert\)"):
        load_tokenizer(path)


class Greedy:
    """One sequence of one model that takes complete id lists and reuses the cached prefix."""

    def __init__(self, path: Path) -> None:
        self.model = Model(path)
        self.context = Context(self.model, sequences=1, length=512, batch=512, threads=1)
        self.held: list[int] = []

    def best(self, ids: list[int], outputs: int) -> list[int]:
        """The most likely next id after each of the last `outputs` of `ids`."""
        keep = 0
        while keep < min(len(self.held), len(ids) - outputs) and self.held[keep] == ids[keep]:
            keep += 1
        self.context.trim(0, keep)
        self.held = list(ids)
        return self.context.decode([Row(0, ids[keep:], keep, outputs)]).argmax(axis=1).tolist()

    def answer(self, prompt: list[int], n: int) -> list[int]:
        ids = list(prompt)
        while len(ids) < len(prompt) + n and ids[-1] not in self.model.tokenizer.ends:
            ids += self.best(ids, 1)
        return ids[len(prompt) :]


def speculated(base: Greedy, draft: Greedy, request: Request, n: int, k: int) -> tuple[list[int], int, int]:
    """A minimal form of speculative decoding; returns the answer and how many ids were proposed and accepted."""
    ends, prompt = base.model.tokenizer.ends, base.model.tokenizer.render(request)
    text = Bridge(base.model.tokenizer, draft.model.tokenizer).text(request, prompt)
    answer: list[int] = []
    proposed = accepted = 0
    while len(answer) < n and not (answer and answer[-1] in ends):
        drafted: list[int] = []
        while len(drafted) < k and not (drafted and drafted[-1] in draft.model.tokenizer.ends):
            drafted += draft.best(text.ids + drafted, 1)
        new = text.translate(drafted)[: n - len(answer) - 1]
        best = base.best(prompt + answer + new, len(new) + 1)
        agreed = 0
        while agreed < len(new) and new[agreed] == best[agreed]:
            agreed += 1
        settled = best[: agreed + 1]
        if agreed and best[agreed - 1] in ends:
            settled = best[:agreed]
        proposed, accepted = proposed + len(new), accepted + agreed
        answer += settled
        for id in settled:
            text.append(id)
    return answer, proposed, accepted


@pytest.mark.parametrize("sizes", [(512, 330), (330, 512)])
def test_bridged_drafting_does_not_change_answers(sizes):
    base, draft = (Greedy(memorising_model(size)) for size in sizes)
    proposed = accepted = 0
    prompts = [" ".join(s.split(" ")[:n]) for s in SENTENCES for n in (1, 2, 3)] + ["€ no sentence"]
    for i, prompt in enumerate(prompts):
        request = Request(prompt=prompt)
        plain = base.answer(base.model.tokenizer.render(request), 80)
        bridged, drafted, agreed = speculated(base, draft, request, 80, k=1 + i % 7)
        assert bridged == plain
        proposed, accepted = proposed + drafted, accepted + agreed
    print(f"{sizes}: {accepted} of {proposed} proposed ids accepted")
    assert 0.5 < accepted / proposed < 1, "both right and wrong drafts should occur"
