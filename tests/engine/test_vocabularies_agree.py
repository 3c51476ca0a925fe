"""Torch side and llama.cpp side of one vocabulary: the same end token, BOS, and ids of prompts and chats."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer

from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import BundleError, PackageError
from cogumi.core.model_files import locate_model
from cogumi.core.types import Message, Request
from cogumi.engine.json_schema import SchemaCompiler
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.models.tokenization import HFTokenizer
from cogumi.serve.tokenizer_api import text_ids
from cogumi.serve.tool_formats import format_of
from cogumi.serve.tool_requests import Offer, Tool
from support.gguf import edit
from support.pico import TEMPLATE, make_model
from support.public_data import public_data
from support.vocabularies import real_vocabulary

CHAT = Request(
    messages=tuple(
        Message(role, text)
        for role, text in (("system", "Be brief."), ("user", "Hi  there\n"), ("assistant", "Hello"), ("user", "2+2?"))
    )
)
RAW = Request(prompt="The capital of France is")
USER, ASSISTANT, END, PAD = 2, 3, 4, 0


@pytest.fixture(scope="module")
def pico(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("pico"), hidden=32)


def exported(folder: Path) -> Model:
    export_model(folder, folder / "m.gguf", "f32")
    return Model(folder / "m.gguf", vocabulary_only=True)


def settings(folder: Path, **changes) -> None:
    edit(folder / "tokenizer_config.json", **changes)


def add_bos(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing("<|pad|> $A", special_tokens=[("<|pad|>", PAD)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings(folder, bos_token="<|pad|>")


def add_bos_in_template(folder: Path) -> None:
    add_bos(folder)
    settings(folder, chat_template="{{ bos_token }}" + TEMPLATE)


def closing(text: str) -> str:
    return TEMPLATE.replace("<|end|>", text)


CASES = {  # change of the folder, end token, BOS as clients see it, BOS before a raw prompt and before a chat
    "as it is": (lambda f: None, END, None, 0, 0),
    "declared end differs from the template's": (lambda f: settings(f, eos_token="<|pad|>"), END, None, 0, 0),
    "template closes with the declared end": (
        lambda f: settings(f, chat_template=closing("' ~ eos_token ~ '")),
        END,
        None,
        0,
        0,
    ),
    "template closes with a word": (
        lambda f: settings(f, chat_template=closing(" stop "), eos_token="<|pad|>"),
        PAD,
        None,
        0,
        0,
    ),
    "bos by the post-processor": (add_bos, END, "<|pad|>", 1, 1),
    "bos by the template as well": (add_bos_in_template, END, "<|pad|>", 1, 1),
    "bos switched off": (lambda f: (add_bos(f), settings(f, add_bos_token=False)), END, "<|pad|>", 0, 0),
    "bos switched off but in the template": (
        lambda f: (add_bos_in_template(f), settings(f, add_bos_token=False)),
        END,
        "<|pad|>",
        0,
        1,
    ),
    "bos that stands nowhere": (lambda f: settings(f, bos_token="<|pad|>"), END, "<|pad|>", 0, 0),
    "bos of a byte that is not UTF-8": (lambda f: settings(f, bos_token="Ã"), END, "\ufffd", 0, 0),
}


@pytest.mark.parametrize("name", CASES)
def test_end_token_and_bos_are_those_of_the_files_on_both_sides(tmp_path, pico, name):
    change, end, bos, before_raw, before_chat = CASES[name]
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    change(folder)
    torch_side, llama_side = HFTokenizer.load(folder), exported(folder).tokenizer
    assert torch_side.eos == llama_side.eos == end
    assert torch_side.ends <= llama_side.ends <= {PAD, END}
    assert llama_side.settings["bos_token"] == bos
    for request, count in ((RAW, before_raw), (CHAT, before_chat)):
        ids = llama_side.render(request)
        assert ids == torch_side.render(request)
        assert ids.count(PAD) == count
        assert ids[:count] == [PAD] * count
    assert llama_side.settings["chat_template"] == torch_side.settings["chat_template"]
    assert llama_side.settings["eos_token"] == torch_side.settings["eos_token"]


def test_names_of_special_tokens_are_read_in_a_raw_prompt_and_by_request(pico):
    """A raw prompt is text of the model's own format; `text_ids` can also read it as plain text."""
    torch_side, llama_side = HFTokenizer.load(pico), exported(pico).tokenizer
    text = "<|user|>Hi<|end|>"
    special, plain = [USER, *torch_side.encode("Hi"), END], torch_side.encode(text)
    for tokenizer in (torch_side, llama_side):
        assert tokenizer.render(Request(prompt=text)) == special == text_ids(tokenizer, text, True, True)
        assert text_ids(tokenizer, text, True, False) == plain
        chat = tokenizer.render(Request(messages=(Message("user", text),)))
        assert chat.count(END) == 1  # the template's own


def test_bos_of_a_raw_prompt_comes_once_or_not_at_all(tmp_path, pico):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    add_bos(folder)
    for tokenizer in (HFTokenizer.load(folder), exported(folder).tokenizer):
        hi = tokenizer.encode("Hi")
        assert text_ids(tokenizer, "Hi", True, True) == [PAD, *hi]
        assert text_ids(tokenizer, "<|pad|>Hi", True, True) == [PAD, *hi]
        assert text_ids(tokenizer, "Hi", False, True) == hi


def without_end_token(folder: Path) -> Path:
    """A GGUF file that declares no special tokens: llama.cpp then reports ids 11 of a byte-level vocabulary."""
    from gguf import GGUFReader

    export_model(folder, folder / "m.gguf", "f32")
    data = (folder / "m.gguf").read_bytes()
    for key in (b"tokenizer.ggml.eos_token_id", b"tokenizer.ggml.eot_token_id"):
        data = data.replace(key, key[:-2] + b"xx")
    (folder / "m.gguf").write_bytes(data)
    assert "tokenizer.ggml.eos_token_id" not in GGUFReader(folder / "m.gguf").fields
    return folder / "m.gguf"


def test_a_special_token_that_a_file_does_not_declare_is_not_invented(tmp_path, pico):
    folder = Path(shutil.copytree(pico, tmp_path / "m"))
    tokenizer = Model(without_end_token(folder), vocabulary_only=True).tokenizer
    assert tokenizer.eos == END  # by the template
    assert tokenizer.settings["bos_token"] is None
    assert 11 not in tokenizer.ends
    names = json.loads((folder / "tokenizer.json").read_text().replace("<|end|>", "<|fin|>"))
    (folder / "tokenizer.json").write_text(json.dumps(names))
    settings(folder, eos_token="<|fin|>", chat_template="{{ messages[0].content }}")
    with pytest.raises(BundleError, match="no end-of-answer token"):
        Model(without_end_token(folder), vocabulary_only=True)


@pytest.mark.parametrize(
    ("name", "declared", "end", "bos"),
    [
        ("llama3", "<|eot_id|>", "<|eot_id|>", "<|begin_of_text|>"),
        ("llama3", "<|end_of_text|>", "<|eot_id|>", "<|begin_of_text|>"),
        ("qwen2", "<|im_end|>", "<|im_end|>", None),
        ("qwen2", "<|endoftext|>", "<|im_end|>", None),
    ],
)
def test_published_vocabularies_agree_with_transformers(tmp_path, name, declared, end, bos):
    folder = real_vocabulary(tmp_path / "m", name, hidden=32)
    settings(folder, eos_token=declared)
    ours, theirs = HFTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    llama_side = exported(folder).tokenizer
    assert ours.eos == llama_side.eos == theirs.convert_tokens_to_ids(end)
    assert theirs.eos_token_id in llama_side.ends
    assert llama_side.settings["bos_token"] == ours.settings["bos_token"] == bos
    assert llama_side.settings["eos_token"] == ours.settings["eos_token"] == declared
    chat = [{"role": m.role, "content": m.content} for m in CHAT.messages]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert ours.render(CHAT) == llama_side.render(CHAT) == expected
    assert ours.render(RAW) == llama_side.render(RAW) == theirs(RAW.prompt)["input_ids"]


def test_the_packaged_model_ends_answers_with_its_own_token(tmp_path):
    try:
        path = locate_model("smollm2", tmp_path)
    except PackageError as error:
        pytest.skip(str(error))
    engine = LlamaEngine(path, slots=1, context=128, threads=1)
    tokenizer = engine.tokenizer
    assert (tokenizer.eos, tokenizer.settings["eos_token"]) == (2, "<|im_end|>")
    assert tokenizer.encode("<|im_start|>", special=True) == tokenizer.render(CHAT)[:1] == [1]
    assert 1 not in tokenizer.render(RAW)
    question = Request(messages=(Message("user", "What is the capital of France?"),))
    assert (
        engine.score(question, "The capital of France is Paris.").nats < 5
    )  # 17 with the end token that llama.cpp guesses
    engine.close()


def test_qwens_own_template_offers_tools_and_its_tokens_write_calls(tmp_path):
    """Both sides and transformers render alike, and the grammar allows the call token by token, but no other name."""
    folder = real_vocabulary(tmp_path / "m", "qwen2", hidden=32)
    known = json.loads(public_data("tokenizer_hf/qwen2.5/tokenizer_config.json").read_text("utf-8"))["chat_template"]
    settings(folder, chat_template=known)
    torch_side, llama_side = HFTokenizer.load(folder), exported(folder).tokenizer
    tool = {"name": "map", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    call = {"name": "map", "arguments": {"city": "Lima"}}
    chat = (Message("user", "Show me Lima"), Message("assistant", "", (json.dumps(call),)), Message("tool", "done"))
    turns = [
        {"role": "user", "content": "Show me Lima"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "done"},
    ]
    offered = [{"type": "function", "function": tool}]
    made = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        turns, tools=offered, add_generation_prompt=True, tokenize=True
    )
    request = Request(messages=chat, tools=(json.dumps(tool),))
    assert llama_side.render(request) == torch_side.render(request) == list(made["input_ids"])
    tools = format_of(known, Offer.of([Tool.model_validate(offered[0])], "auto", None))
    for text, right in (
        ('Sure.\n<tool_call>\n{"name": "map", "arguments": {"city": "Lima"}}\n</tool_call>', True),
        ('<tool_call>\n{"name": "mop", "arguments": {}}\n</tool_call>', False),
    ):
        grammar, allowed = SchemaCompiler(llama_side).compile_lark(tools.lark()), True
        for token in llama_side.encode(text, special=True):
            allowed = allowed and grammar.allows(token)
            if allowed:
                grammar.accept(token)
        assert (allowed and grammar.allows(llama_side.eos)) == right
