"""Function tools over HTTP: what the model is asked, what is read out of its answer, what is refused."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.tool_wording import tool_question
from cogumi.core.types import Message
from cogumi.engine.json_schema import SchemaCompiler
from cogumi.serve.tool_formats import format_of
from cogumi.serve.tool_requests import Offer, Tool
from support.serve import ByteTokenizer, raw

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


def tool(name, parameters=CITY, **more):
    return {"type": "function", "function": {"name": name, "parameters": parameters} | more}


TOOLS = [tool("map"), tool("weather", description="Weather  of\na city")]
EARLIER = [{"id": "1", "function": {"name": "map"}}]
CALL = '{"tool":"map","args":{"city":"Lima"}}'


@pytest.fixture
def answers(engine, monkeypatch):
    """Makes the scripted engine answer any request with a text."""

    def answer(text):
        monkeypatch.setattr(engine, "generate", lambda request: engine._events("echo", text, request))

    return answer


def ask(client, text="echo Where is Lima?", messages=None, **options):
    messages = messages or [{"role": "user", "content": text}]
    return client.chat.completions.create(model="cogumi", messages=messages, **{"tools": TOOLS} | options)


def test_tools_are_offered_in_the_words_of_the_training_data(client, engine):
    ask(client)
    asked = engine.requests[-1]
    words = ["map(city)", "weather(city) [Weather of a city]"]
    assert asked.messages[-1].content == tool_question(words, "echo Where is Lima?")
    assert "TEXT" in asked.lark
    ask(client, tool_choice="required", parallel_tool_calls=True)
    assert "TEXT" not in engine.requests[-1].lark
    assert "or a list of several" in engine.requests[-1].messages[-1].content
    ask(client, tool_choice={"type": "function", "function": {"name": "map"}})
    assert engine.requests[-1].messages[-1].content == tool_question(["map(city)"], "echo Where is Lima?")
    ask(client, tool_choice="none")
    assert engine.requests[-1].messages[-1].content == "echo Where is Lima?"
    assert engine.requests[-1].lark is None


def test_call_is_returned_as_a_tool_call(client, answers):
    answers(CALL)
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    (call,) = choice.message.tool_calls
    assert (call.type, call.function.name) == ("function", "map")
    assert json.loads(call.function.arguments) == {"city": "Lima"}
    assert call.id.startswith("call_")


def test_several_calls_have_their_own_ids(client, answers):
    answers('[{"tool":"map","args":{"city":"Lima"}},{"tool":"weather","args":{"city":"Oslo"}}]')
    calls = ask(client, parallel_tool_calls=True).choices[0].message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)["city"]) for c in calls] == [
        ("map", "Lima"), ("weather", "Oslo")
    ]  # fmt: skip
    assert len({call.id for call in calls}) == 2


def test_answer_in_words_stays_content(client, answers):
    answers("I don't know.")
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("stop", "I don't know.", None)
    streamed = list(ask(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == "I don't know."


def test_streamed_call_begins_with_its_name(client, answers):
    answers(f" {CALL}")
    chunks = [chunk.choices[0] for chunk in ask(client, stream=True)]
    deltas = [delta for chunk in chunks for delta in chunk.delta.tool_calls or ()]
    assert [delta.index for delta in deltas] == [0] * len(deltas)
    assert (deltas[0].id[:5], deltas[0].type, deltas[0].function.name) == ("call_", "function", "map")
    assert json.loads("".join(delta.function.arguments for delta in deltas)) == {"city": "Lima"}
    assert not any(chunk.delta.content for chunk in chunks)
    assert chunks[-1].finish_reason == "tool_calls"
    with client.chat.completions.stream(
        model="cogumi", messages=[{"role": "user", "content": "echo x"}], tools=TOOLS
    ) as stream:
        message = stream.get_final_completion().choices[0].message
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Lima"}


def test_earlier_calls_and_results_become_messages(client, engine):
    calls = [
        {"id": f"c{i}", "type": "function", "function": {"name": "map", "arguments": f'{{"city":"{city}"}}'}}
        for i, city in enumerate(("Lima", "Oslo"))
    ]
    ask(
        client,
        messages=[
            {"role": "user", "content": "Show me Lima and Oslo."},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c0", "content": "echo done"},
            {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "gone"}]},
        ],
    )
    asked, called, result = engine.requests[-1].messages
    assert asked.content.endswith("Request: Show me Lima and Oslo.")
    assert json.loads(called.content) == [
        {"tool": "map", "args": {"city": "Lima"}}, {"tool": "map", "args": {"city": "Oslo"}}
    ]  # fmt: skip
    assert (result.role, result.content) == ("user", "map returned: echo done\nmap returned: gone")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [tool("two words")]}, "name"),
        ({"tools": [tool("map"), tool("map")]}, "same name"),
        ({"tools": [], "tool_choice": "required"}, "no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "nope"}}}, "'nope'"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"messages": [{"role": "system", "content": "x"}]}, "message of the user"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "tool_call_id '1'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": EARLIER}]}, "only an assistant"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
    ],
)  # fmt: skip
def test_invalid_tools_are_refused_by_name(port, change, named):
    body = {"model": "cogumi", "messages": [{"role": "user", "content": "echo"}], "tools": TOOLS} | change
    status, _, data = raw(port, "POST", "/v1/chat/completions", json.dumps(body))
    assert status == 400
    assert named in json.loads(data)["error"]["message"]


def test_cut_call_is_content(client, engine, monkeypatch):
    def cut(request):
        for event in engine._events("echo", CALL[:-2], request):
            yield (
                event
                if not hasattr(event, "finish_reason")
                else type(event)(event.text, event.tokens, "length", event.usage)
            )

    monkeypatch.setattr(engine, "generate", cut)
    choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.message.content, choice.message.tool_calls) == ("length", CALL[:-2], None)


PARTY = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "description": "of guests"},
        "price": {"type": "number"},
        "public": {"type": "boolean"},
        "age": {"type": "integer", "minimum": 18},
        "zip": {"type": "string"},
    },
}


def test_numbers_in_quotes_get_their_type(client, engine, answers):
    ask(client, tools=[tool("party", PARTY)], tool_choice="required")
    lark, compiler = engine.requests[-1].lark, SchemaCompiler(ByteTokenizer())
    for arguments, right in (
        ({"count": "36", "price": "-1.5", "public": "true", "zip": "01234"}, True),
        ({"count": 36, "price": 1.5, "public": False}, True),
        ({"count": "36.5"}, False),
        ({"count": "many"}, False),
        ({"count": "007"}, False),
        ({"age": "20"}, False),
        ({"age": 20}, True),
        ({"zip": 1234}, False),
    ):
        text = json.dumps({"tool": "party", "args": arguments})
        grammar, allowed = compiler.compile_lark(lark), True
        for byte in text.encode():
            allowed = allowed and grammar.allows(byte)
            if allowed:
                grammar.accept(byte)
        assert (allowed and grammar.allows(256)) == right, text
    answers('{"tool":"party","args":{"count":"36","price":"-1.50","public":"true","zip":"01234","age":20}}')
    call = ask(client, tools=[tool("party", PARTY)]).choices[0].message.tool_calls[0]
    found = json.loads(call.function.arguments)
    assert found == {"count": 36, "price": -1.5, "public": True, "zip": "01234", "age": 20}


NAMES = st.from_regex(r"[A-Za-z0-9_.-]{1,12}", fullmatch=True)
ANY = {"type": "object", "additionalProperties": {"type": "string"}}
HERMES = "{{ tools }}<tool_call>"
LLAMA3 = '{{ tools }}{"name": "parameters"}'


def accepts(lark, text):
    grammar = SchemaCompiler(ByteTokenizer()).compile_lark(lark)
    for byte in text.encode():
        if not grammar.allows(byte):
            return False
        grammar.accept(byte)
    return grammar.allows(256)


@given(NAMES, st.dictionaries(st.text("abc{}<>/ é", max_size=8), st.text("abc{}<>/ é", max_size=8), max_size=3))
@settings(deadline=None, max_examples=40)
def test_every_call_is_allowed_and_read_back_in_every_format(name, arguments):
    offer = Offer.of([Tool.model_validate(tool(name, ANY))], "auto", None)
    given = json.dumps(arguments, ensure_ascii=False)
    for template, text, words in (
        (None, f'{{"tool": "{name}", "args": {given}}}', ""),
        (LLAMA3, f'{{"name": "{name}", "parameters": {given}}}', ""),
        (HERMES, f'<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>', ""),
        (HERMES, f'<tool_call>{{"name": "{name}", "arguments": {given}}} </tool_call>', ""),
        (HERMES, f'I look. <t\n<tool_call>\n{{"name": "{name}", "arguments": {given}}}\n</tool_call>', "I look. <t"),
    ):
        tools = format_of(template, offer)
        if "</tool_call>" not in given:
            assert accepts(tools.lark(), text), text
            said, (call,) = tools.read(text)
            assert (said, call.name, json.loads(call.arguments)) == (words, name, arguments)
        assert text[: tools.shown(text)].strip() == words
        assert all(words.startswith(text[: tools.shown(text[:n])]) for n in range(len(text)))


@pytest.mark.parametrize("template", [None, HERMES, LLAMA3])
def test_grammar_allows_words_and_no_other_call(template):
    tools = format_of(template, Offer.of([Tool.model_validate(tool("map"))], "auto", None))
    assert accepts(tools.lark(), "I don't know.")
    for text in (
        '{"tool": "map", "args": {"city": 7}}',
        '{"tool": "nope", "args": {"city": "Lima"}}',
        '{"name": "map", "parameters": {}}',
        '<tool_call>\n{"name": "map", "arguments": {"town": "Lima"}}\n</tool_call>',
        'I look. <tool_call> {"name": "map"} </tool_call>',
    ):
        shown = template == HERMES and text[0] == "{"  # words, in this format
        assert accepts(tools.lark(), text) == (shown or (template != HERMES and text[0] in "<I")), text
    one = format_of(template, Offer.of([Tool.model_validate(tool("map"))], "auto", False))
    assert accepts(one.lark(), "No.")
    required = format_of(template, Offer.of([Tool.model_validate(tool("map"))], "required", None))
    assert not accepts(required.lark(), "I don't know.")


def test_templates_get_tools_calls_and_results_themselves(client, engine, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "settings", {"chat_template": HERMES})
    calls = [{"id": "c0", "type": "function", "function": {"name": "map", "arguments": '{"city":"Lima"}'}}]
    ask(
        client,
        messages=[
            {"role": "user", "content": "echo Show me Lima."},
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "tool_call_id": "c0", "content": "echo done"},
        ],
    )
    asked = engine.requests[-1]
    assert asked.messages == (
        Message("user", "echo Show me Lima."),
        Message("assistant", "", ('{"name": "map", "arguments": {"city": "Lima"}}',)),
        Message("tool", "echo done"),
    )
    assert [json.loads(one)["name"] for one in asked.tools] == ["map", "weather"]
    said = 'Yes.\n<tool_call>\n{"name": "map", "arguments": {"city": "Lima"}}\n</tool_call>'
    monkeypatch.setattr(engine, "generate", lambda request: engine._events("echo", said, request))
    message = ask(client).choices[0].message
    assert (message.content, message.tool_calls[0].function.arguments) == ("Yes.", '{"city": "Lima"}')
    chunks = [chunk.choices[0].delta for chunk in ask(client, stream=True)]
    assert "".join(delta.content or "" for delta in chunks) == "Yes."
    assert sum(bool(delta.tool_calls) for delta in chunks) == 2
