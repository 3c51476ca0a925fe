"""JSON schemas as grammars: accepted texts, texts generated under them, and unsupported schemas."""

import enum
import json
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import date
from typing import Annotated, Literal, Optional

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field, TypeAdapter

from cogumi.core.errors import RequestError
from cogumi.core.types import Request
from cogumi.engine.json_schema import MAX_CHARACTERS, SchemaCompiler
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.engine import LlamaEngine
from support.engines import CHAT, ask, opened, pico, plain


class Bytes:
    """A vocabulary of single bytes with two end tokens and one special token."""

    size, eos, ends, settings = 259, 256, frozenset({256, 257}), {}

    def piece(self, token):
        return bytes([token]) if token < 256 else b""

    def encode(self, text, special=False):
        return list(text.encode())


COMPILER = SchemaCompiler(Bytes())


def accepts(schema, text):
    """Whether the grammar of a schema accepts a complete text."""
    grammar = COMPILER.compile(json.dumps(schema))
    for byte in text.encode():
        if not grammar.allows(byte):
            return False
        grammar.accept(byte)
    return grammar.allows(256)


DEFS = {
    "kind": {"type": "object", "properties": {"v": {"type": "boolean"}}, "required": ["v"]},
    "A": {"properties": {"v": {"type": "integer"}}},
    "B": {"properties": {"v": {"type": "string"}}},
    "a/b": {"const": 1},
    "c~d": {"const": 2},
}
AB = [{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"properties": {"b": True}}]
PAIR = [{"type": "integer"}, {"type": "string"}]
CHAIN = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
    "required": ["n", "next"],
}


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"properties": {"kind": {"$ref": "#/$defs/kind"}}}, [{"kind": {"v": True}}], [{"kind": 1}]),
        ({"$ref": "#/$defs/A/properties/v"}, [1, -20], ["x"]),
        ({"$ref": "#/$defs/B/properties/v"}, ["x"], [1]),
        ({"$ref": "#/$defs/a~1b"}, [1], [2]),
        ({"$ref": "#/$defs/c~0d"}, [2], [1]),
        ({"allOf": AB}, [{"a": 1}, {"a": 1, "b": 2}], [{"b": 2}, {"a": "x"}]),
        (CHAIN, [{"n": 1, "next": None}, {"n": 1, "next": {"n": 2, "next": None}}], [{"n": 1}, {"n": 1, "next": 2}]),
        ({"type": ["array", "null"], "items": {"$ref": "#"}}, [None, [], [[None], []]], [[1], 1]),
        ({"type": "integer", "minimum": -3, "maximum": 12}, [-3, 0, 12], [-4, 13, 100]),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5], [0, 1, -0.5]),
        ({"type": "integer", "multipleOf": 5}, [0, 35], [7]),
        ({"type": "string", "pattern": "^[A-Z]{2}\\d{3}$"}, ["AB123"], ["AB12", "ab123", "AB1234"]),
        ({"type": "string", "format": "date"}, ["2024-02-29"], ["2024-13-01", "yesterday"]),
        ({"type": "string", "format": "email"}, ["a@b.de"], ["a"]),
        ({"oneOf": [{"type": "integer"}, {"type": "string", "maxLength": 2}]}, [1, "ab"], ["abc", None]),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["x"]),
        ({"type": ["string", "null"], "enum": ["a", None]}, ["a", None], ["b"]),
        ({"prefixItems": PAIR, "minItems": 2, "items": False}, [[1, "x"]], [[1], ["x", 1], [1, "x", 2]]),
        ({"type": "array", "minItems": 2, "maxItems": 3}, [[1, "x"], [[], {}, None]], [[1], [1, 2, 3, 4]]),
        ({"type": "object", "required": ["z"]}, [{"z": 1}], [{}]),
        ({"minProperties": 1, "additionalProperties": {"type": "integer"}}, [{"q": 1}], [{}, {"q": "x"}]),
        ({"patternProperties": {"^x_": {"type": "integer"}}, "additionalProperties": False}, [{"x_1": 2}], [{"y": 2}]),
        ({"type": "object"}, [{}, {"a": [1]}], [[], 1]),
        ({}, [1, "x", None, [], {}], []),
    ],
)
def test_grammar_accepts_valid_and_rejects_invalid_texts(schema, right, wrong):
    schema = schema | {"$defs": DEFS}
    for value in right:
        for text in (json.dumps(value), json.dumps(value, separators=(",", ":"))):
            assert accepts(schema, text), text
    assert not [value for value in wrong if accepts(schema, json.dumps(value))]


@pytest.mark.parametrize(
    "value", ["C:\\dir", "a\nb", 'say "x"', "é😀", "\u0001", "\u2028", "", 0, -1.5, None, [1, {"a": "\\"}]]
)
def test_constants_are_encoded_as_json(value):
    assert accepts({"const": value}, json.dumps(value, ensure_ascii=False))
    assert accepts({"enum": [7, value]}, json.dumps(value, ensure_ascii=False))
    assert not accepts({"const": value}, "1")


@pytest.mark.parametrize(
    "name", ["space", "Status", "x[int]", "_u", "a_b", 'q"uote', "\\", "", "é", "a/b~c", "two words", "root"]
)
def test_property_names_may_be_any_text(name):
    schema = {"type": "object", "properties": {name: {"type": "integer"}, "last": {"const": 1}}, "required": [name]}
    assert accepts(schema, json.dumps({name: 1, "last": 1}, ensure_ascii=False))
    assert not accepts(schema, '{"last": 1}')


def test_objects_are_closed_without_additional_properties():
    listed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    more = '{"a": 1, "b": 2}'
    assert not accepts(listed, more)
    assert not accepts({"type": "array", "items": {"anyOf": [listed, {"type": "null"}]}}, f"[{more}]")
    for open_ in (
        listed | {"additionalProperties": True},
        listed | {"required": ["b"]},
        {"allOf": [listed, {"required": ["b"]}]},
        {"$ref": "#/$defs/x", "required": ["b"], "$defs": {"x": listed}},
    ):
        assert accepts(open_, more)


def test_white_space_is_bounded():
    listed = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for text in ('{"a":1}', '{ "a" : 1 }', '{\n  "a": 1\n}'):
        assert accepts(listed, text)
    for text in (' {"a":1}', '{"a":  1}', '{\n\n"a": 1}', '{"a": 1} '):
        assert not accepts(listed, text)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        *(({word: {}}, word) for word in ("not", "if", "contains", "propertyNames", "unevaluatedProperties")),
        ({"uniqueItems": True}, "uniqueItems"),
        ({"dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"not": {}}]}}}, "not"),
        ({"type": "string", "format": "binary"}, "binary"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf"),
        ({"$ref": "http://example.com/x"}, "example.com"),
        ({"$ref": "#/$defs/no"}, "/\\$defs/no"),
        ({"$ref": "#"}, "finite"),
        ({"type": "wrong"}, "wrong"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"enum": []}, "empty"),
        ({"required": [{}]}, "required"),
        ({"properties": {"a": 5}}, "boolean"),
        ({"const": 2**60 + 1}, "2\\^53"),
        ({"const": float("inf")}, "Out of range"),
        ({"const": "\ud800"}, "hex escape"),
        ({"multipleOf": 123456789}, "multipleOf 123456789"),
        ({"anyOf": [{"multipleOf": 997}, {"multipleOf": 991}]}, "multipleOf 99"),
        ({"const": {"multipleOf": 99991}, "$ref": "#/const"}, "multipleOf 99991"),
        ({"x-guidance": {"lenient": True}, "not": {}}, "not"),
        ({"allOf": [{"properties": {f"p{i}": {"minLength": 1}}} for i in range(500)]}, "too large"),
        ([], "object"),
        ({"title": "x" * MAX_CHARACTERS}, "characters"),
    ],
)
def test_unsupported_keywords_are_refused_by_name(schema, message):
    with pytest.raises(RequestError, match=message) as refused:
        COMPILER.compile(json.dumps(schema))
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize(
    "text", ["nonsense", "", "[" * 100_000, '{"a":' * 5000, '{"const": 1', '{"const": ' + "1" * 5000 + "}"]
)
def test_text_that_is_not_a_schema_is_refused(text):
    with pytest.raises(RequestError, match="JSON schema"):
        COMPILER.compile(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
WORDS = st.sampled_from(
    [
        *("type", "properties", "required", "items", "anyOf", "allOf", "oneOf"),
        *("$ref", "enum", "const", "minimum", "pattern", "format"),
    ]
)


@given(st.dictionaries(WORDS, st.recursive(JSON, lambda inner: st.dictionaries(WORDS, inner, max_size=3)), max_size=4))
@settings(deadline=None, max_examples=300)
def test_any_json_is_compiled_or_refused(schema):
    try:
        grammar = COMPILER.compile(json.dumps(schema))
    except RequestError:
        return
    grammar.mask(np.zeros(Bytes.size, np.float32))


class Color(enum.StrEnum):
    RED = "red"
    ODD = 'a"b\\c'


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: Annotated[int, Field(ge=0, le=9)]


class Dog(BaseModel):
    kind: Literal["dog"]
    good: bool


class Tree(BaseModel):
    value: Color
    left: Optional["Tree"] = None
    right: Optional["Tree"] = None


class Everything(BaseModel):
    id: uuid.UUID
    when: date
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    pair: tuple[int, Color]
    size: Annotated[float, Field(gt=0, lt=2.5)]
    code: Annotated[str, Field(pattern=r"^[A-Z]{2}\d$")]
    tags: Annotated[list[Literal["x", 1, None]], Field(max_length=2)]
    table: Annotated[dict[str, bool], Field(min_length=1, max_length=2)]


MODELS = [Color, Tree, Everything, Cat | Dog | None, list[Tree], dict[str, Cat], tuple[int, str], tuple[Dog, ...]]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_text_generated_under_a_schema_is_valid(model):
    """Random logits biased towards closing brackets; token masks and single-token checks agree at every step."""
    adapter = TypeAdapter(model)
    schema = adapter.json_schema()
    tokenizer = Model(pico().base_q8).tokenizer
    compiler = SchemaCompiler(tokenizer)
    closers = np.array(
        [tokenizer.piece(i)[:1] in (b'"', b"}", b"]") or i in tokenizer.ends for i in range(tokenizer.size)]
    )
    for seed in range(5):
        draw, grammar = np.random.default_rng(seed), compiler.compile(json.dumps(schema))
        ids = []
        while not ids or ids[-1] not in tokenizer.ends:
            row = draw.gumbel(size=tokenizer.size).astype(np.float32) + closers * np.float32(3 + len(ids) / 50)
            grammar.mask(row)
            some = draw.integers(0, tokenizer.size, 20)
            assert [grammar.allows(int(i)) for i in some] == np.isfinite(row[some]).tolist()
            ids.append(int(row.argmax()))
            grammar.accept(ids[-1])
        value = json.loads(b"".join(map(tokenizer.piece, ids)).decode())
        jsonschema.Draft202012Validator(schema).validate(value)
        adapter.validate_json(json.dumps(value)) if "date" not in str(
            schema
        ) else None  # 30 February matches the pattern of `date`


def test_tokens_forbidden_by_a_schema_cannot_be_accepted():
    grammar = COMPILER.compile('{"const": 7}')
    for token in (ord("8"), 255, 256, 258):
        assert not grammar.allows(token)
        with pytest.raises(RequestError, match="does not allow"):
            grammar.accept(token)
    grammar.accept(ord("7"))
    row = np.zeros(Bytes.size, np.float32)
    grammar.mask(row)
    assert np.flatnonzero(row == 0).tolist() == [256, 257]
    grammar.accept(257)


def test_too_complex_schema_fails_only_its_request():
    many = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(2000)}}
    grammar = COMPILER.compile(json.dumps(many))
    with pytest.raises(RequestError, match="too complex"):
        grammar.accept(ord("{"))
    assert accepts({"const": 1}, "1")


@pytest.fixture(scope="module")
def engine():
    with closing(opened()) as engine:
        yield engine


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 4}])
def test_speculation_does_not_change_answers_under_a_schema(engine, sampling):
    schema = json.dumps({"type": "array", "items": {"enum": ["Paris", "Rome", "x y"]}, "minItems": 4, "maxItems": 4})
    request = Request(messages=CHAT, max_tokens=80, json_schema=schema, **sampling)
    one, two = (ask(engine, replace(request, speculate=speculate)) for speculate in (False, True))
    assert len(json.loads(two.text)) == 4
    if not sampling:
        assert plain(one) == plain(two)
    assert two.usage.drafted > 0


@pytest.mark.parametrize(
    ("schema", "favoured", "answer"),
    [
        ({"type": "string", "maxLength": 500}, "b", "b" * 500),
        ({"type": "string", "minLength": 990, "maxLength": 1000}, "b", "b" * 1000),
        ({"type": "array", "items": {"const": 7}, "minItems": 1, "maxItems": 500}, ",", [7] * 500),
    ],
)
def test_long_strings_and_lists_respect_their_length_limits(schema, favoured, answer):
    long = LlamaEngine(pico().base_q8, threads=1, slots=1, context=1100, lookup=False)
    spaces = {i: -100.0 for i in range(long.tokenizer.size) if long.tokenizer.piece(i)[:1] in (b" ", b"\n")}
    bias = {long.tokenizer.encode(favoured)[0]: 100.0} | spaces
    reply = ask(long, Request(prompt="x", max_tokens=1090, json_schema=json.dumps(schema), logit_bias=bias))
    assert json.loads(reply.text) == answer
    long.close()


def test_generated_strings_contain_no_raw_control_characters(engine):
    newline = engine.tokenizer.encode("\n")[0]
    request = Request(messages=CHAT, max_tokens=40, json_schema='{"type": "string", "maxLength": 8}')
    reply = ask(engine, replace(request, logit_bias={newline: 100.0}))
    assert isinstance(json.loads(reply.text), str)
