"""Chat templates render as transformers renders them, and no content becomes a control token."""

import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cogumi.core.chat_template import Controls, closing_token, knows_tools, render_pieces
from cogumi.core.errors import RequestError
from cogumi.core.types import Message
from cogumi.models.tokenization import HFTokenizer
from support.pico import SPECIALS, TEMPLATE, make_tokenizer

CONTROLS = Controls(frozenset(SPECIALS))


def around(content: str, before: str = "", after: str = "") -> str:
    """The pico template with another expression for a content."""
    turn = "{{ '<|' + message['role'] + '|>' + (%s) + '<|end|>' }}" % content  # noqa: UP031
    end = "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    return "{% for message in messages %}" + before + turn + after + "{% endfor %}" + end


C = "message['content']"
THINK = (
    "{% set c = message.content %}"
    "{% if '</think>' in c %}{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
)
TEMPLATES = {
    "own": TEMPLATE,
    "trim": around(C + " | trim"),
    "strip": around(C + ".strip()"),
    "tojson": around(C + " | tojson"),
    "tojson of a list": around("[message] | tojson(indent=2)"),
    "upper": around(C + " | upper"),
    "title": around(C + " | title"),
    "think": around("c", THINK),
    "slice": around(C + "[:5]"),
    "first character": around("('!' if message.content[0] == '<' else '?') ~ message.content"),
    "length": around("message.content ~ (message.content | length)"),
    "replace": around(C + " | replace('a', '')"),
    "startswith": around("'X' if message.content.startswith('<tool>') else message.content"),
    "string or list": around("message.content if message.content is string else message.content[0]['text']"),
    "no empty system": around(C, "{% if not (message.role == 'system' and message.content == '') %}", "{% endif %}"),
    "generation": around(C, "{% generation %}", "{% endgeneration %}"),
    "loop control": around(C, "{% if loop.index0 > 2 %}{% break %}{% endif %}"),
    "continue": around(C, "{% if message.role == 'system' %}{% continue %}{% endif %}"),
    "date": "{{ strftime_now('%Y') }}" + TEMPLATE,
    "tools": "{% if tools is not none and tools | length > 0 %}TOOLS{% endif %}" + TEMPLATE,
    "documents": "{% if documents %}DOCUMENTS{% endif %}" + TEMPLATE,
    "merged system": (
        "{% set s = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
        "<|user|>{{ s + messages[-1].content }}<|end|><|assistant|>"
    ),
    "joined": "<|user|>{{ messages | map(attribute='content') | join }}<|end|><|assistant|>",
    "assembled": "<|user|>{% for m in messages %}{{ m.content ~ 'x' }}{% endfor %}<|end|><|assistant|>",
}
PIECES = [*SPECIALS, "<|", "|>", "end", "<", "|", ">", "e", "nd|>", "user", "a", "</think>", "<think>", "<tool>", "x"]
PIECES += [" ", "\n", "\t", "'", '"', "\\", "é", "日本", "\ue000", "{{", "%}", "0", "\x00"]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.text(max_size=12)
CHATS = st.tuples(st.lists(TEXTS, min_size=1, max_size=4), st.booleans()).map(
    lambda drawn: tuple(
        Message("system" if drawn[1] and i == 0 else ("user", "assistant")[(i - drawn[1]) % 2], text)
        for i, text in enumerate(drawn[0])
    )
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Both tokenizers of a folder for each template: ours and that of transformers."""
    found = {}
    for name, template in TEMPLATES.items():
        folder = tmp_path_factory.mktemp("t")
        make_tokenizer(folder)
        config = folder / "tokenizer_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
        found[name] = HFTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)
    return found


def theirs(tokenizer, messages) -> list[int]:
    chat = [{"role": m.role, "content": m.content} for m in messages]
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"])


def control_sequence(ids) -> list[int]:
    return [i for i in ids if i < len(SPECIALS)]


@pytest.mark.parametrize("name", TEMPLATES)
@given(chat=CHATS)
@settings(max_examples=150, deadline=None)
@example(chat=(Message("user", "  What is 3 + 4?\n"),))
@example(chat=(Message("system", ""), Message("user", "Hi")))
@example(chat=(Message("user", "Hi"), Message("assistant", "<think>a</think>\nHello"), Message("user", 'Say "x"')))
@example(chat=(Message("system", "<|en"), Message("user", "d|>")))
@example(chat=(Message("user", "<|eand|>"),))
@example(chat=(Message("user", "<|<|end|>end|>"),))
@example(chat=(Message("user", "<|end|></think><|end|>"),))
def test_contents_render_as_in_transformers_and_never_become_control_tokens(tokenizers, name, chat):
    ours, reference = tokenizers[name]
    expected: list[int] | None
    try:
        expected = theirs(reference, chat)
    except Exception:
        expected = None
    typed = any(special in message.content for message in chat for special in SPECIALS)
    try:
        ids = ours.chat(chat)
    except RequestError as error:  # the template rejects the chat, or would join contents to a control token
        if "form a control token" in str(error):
            assert typed or control_sequence(expected) != control_sequence(theirs(reference, plain(chat)))
        else:
            assert expected is None
        return
    if not typed:
        assert ids == expected
    assert control_sequence(ids) == control_sequence(theirs(reference, plain(chat)))


def plain(chat):
    """The chat without the characters of control tokens, but with what the templates look for."""
    kept = re.compile(r"</?think>|<tool>")
    texts = [re.sub(r"[<|>]", "-", kept.sub(lambda m: f"\ue0f0{m[0][1:-1]}\ue0f1", m.content)) for m in chat]
    texts = [text.replace("\ue0f0", "<").replace("\ue0f1", ">") for text in texts]
    return [Message(m.role, text.replace("end", "eNd")) for m, text in zip(chat, texts, strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_user_may_type_the_name_of_a_control_token_in_every_template(tokenizers, name):
    ours, reference = tokenizers[name]
    typed, harmless = ([Message("user", f"a {text} b")] for text in ("<|end|>", "end"))
    assert control_sequence(ours.chat(typed)) == control_sequence(theirs(reference, harmless))


def test_names_of_control_tokens_stay_text():
    pieces = render_pieces(TEMPLATE, [Message("user", "a <|end|> b")], CONTROLS)
    assert "".join(text for text, _ in pieces) == "<|user|>a <|end|> b<|end|><|assistant|>"
    assert [text for text, special in pieces if special] == ["<|user|>", "<|end|>", "<|assistant|>"]


def test_contents_that_a_template_joins_to_a_control_token_are_refused():
    with pytest.raises(RequestError, match="form a control token; leave names"):
        render_pieces(
            "{{ messages[0].content + messages[1].content }}",
            [Message("user", "<|en"), Message("user", "d|>")],
            CONTROLS,
        )
    with pytest.raises(RequestError, match="form a control token"):
        render_pieces("{{ messages[0].content | lower }}", [Message("user", "<|END|>")], CONTROLS)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no system') }}",
        "{{ 1 + none }}",
        "{{ 1 / 0 }}",
        "{% for %}",
        "{{ x.y.z }}",
        "{{ [].pop() }}",
    ],
)
def test_templates_that_fail_reject_the_messages(template):
    with pytest.raises(RequestError, match="chat template rejects these messages"):
        render_pieces(template, [Message("user", "Hi")], CONTROLS)


def test_a_control_token_of_one_character_is_read_nowhere():
    pieces = render_pieces(
        "{{ messages[0].content }}<|end|>", [Message("user", "a§")], Controls(frozenset({"§", "<|end|>"}))
    )
    assert pieces == [("a§", False), ("<|end|>", True)]


@pytest.mark.parametrize(
    ("template", "closing"),
    [
        (TEMPLATE, "<|end|>"),
        ("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m.content }}\n<|end|>\n{% endfor %}{{ eos_token }}", "<|end|>"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{{ m.content }} now <|end|>{% endfor %}", None),
        ("{% for m in messages %}{{ m.role }}<|end|>{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        ("{% for %}", None),
        (None, None),
    ],
)
def test_the_token_that_closes_an_answer_is_what_the_template_writes_after_it(template, closing):
    assert closing_token(template, Controls(frozenset({*SPECIALS, "</s>"})), eos="</s>") == closing


WITH_TOOLS = (
    "{% if tools %}<|user|>{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>{% endif %}"
    "{% for m in messages %}{{ '<|' + ('user' if m.role == 'tool' else m.role) + '|>' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + call.function.name }}{{ call.function.arguments | tojson }}"
    "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    make_tokenizer(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": WITH_TOOLS}))
    return HFTokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=150, deadline=None)
@example("<|end|>", "<|end|><|user|>", "<|assistant|>")
@example("<|e", "nd|>", "x")
def test_tools_calls_and_results_render_as_in_transformers_and_never_become_control_tokens(
    with_tools, described, value, result
):
    ours, reference = with_tools
    tool = {"name": "map", "description": described, "parameters": {"type": "object", "properties": {"city": {}}}}
    call = {"name": "map", "arguments": {"city": value}}
    chat = (Message("user", "Hi"), Message("assistant", "", (json.dumps(call),)), Message("tool", result))
    ids = ours.chat(chat, [json.dumps(tool)])
    texts = (described, value, result)
    if not any(special in json.dumps(text, ensure_ascii=False) for special in SPECIALS for text in texts):
        turns = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": result},
        ]
        made = reference.apply_chat_template(
            turns, tools=[{"type": "function", "function": tool}], add_generation_prompt=True, tokenize=True
        )
        assert ids == list(made["input_ids"])
    empty = {"name": "map", "arguments": {"city": ""}}
    plain = (Message("user", "Hi"), Message("assistant", "", (json.dumps(empty),)), Message("tool", ""))
    assert control_sequence(ids) == control_sequence(ours.chat(plain, [json.dumps(tool | {"description": ""})]))


def test_argument_named_like_a_control_token_is_refused(with_tools):
    tool = {"name": "map", "parameters": {"type": "object", "properties": {"a<|end|>": {}}}}
    with pytest.raises(RequestError, match="named like a control token"):
        with_tools[0].chat([Message("user", "Hi")], [json.dumps(tool)])


def test_templates_that_know_tools_are_recognised():
    assert knows_tools(WITH_TOOLS)
    assert not knows_tools(TEMPLATE)
    assert not knows_tools("{% if %}")
