"""JSON schemas in number: the JSON Schema organization's test suite, and random pydantic models."""

# ruff: noqa: UP007, UP045 - types are put together at run time

import enum
import json
import random
import uuid
from collections import Counter
from typing import Annotated, Literal, Optional, Union

import numpy as np
import pytest
from pydantic import BaseModel, Field, ValidationError, create_model

from cogumi.core.errors import RequestError
from cogumi.engine.json_schema import SchemaCompiler
from support.public_data import public_data
from support.serve import ByteTokenizer

TOKENIZER = ByteTokenizer()
COMPILER = SchemaCompiler(TOKENIZER)
CLOSERS = np.array([bytes([i]) in (b'"', b"}", b"]") if i < 256 else True for i in range(TOKENIZER.size)])


def accepted(schema, value):
    """Whether the grammar of a schema accepts a value in one of its usual spellings."""
    for separators in ((", ", ": "), (",", ":")):
        for plain in (True, False):
            grammar = COMPILER.compile(schema)
            text = json.dumps(value, separators=separators, ensure_ascii=plain)
            if follows(grammar, TOKENIZER.encode(text)) and grammar.allows(TOKENIZER.eos):
                return True
    return False


def follows(grammar, ids):
    for token in ids:
        if not grammar.allows(token):
            return False
        grammar.accept(token)
    return True


def test_official_suite_accepts_nothing_invalid():
    """Draft 2020-12 without its optional part. A schema is enforced or refused; the counts are printed (pytest -rP)."""
    counts = Counter()
    for file in sorted(public_data("json_schema_test_suite/draft2020-12").glob("*.json")):
        for group in json.loads(file.read_text()):
            schema = json.dumps(group["schema"])
            try:
                COMPILER.compile(schema)
            except RequestError:
                counts["schemas refused"] += 1
                continue
            counts["schemas enforced"] += 1
            for case in group["tests"]:
                found = accepted(schema, case["data"])
                assert found <= case["valid"], (file.name, group["description"], case["description"])
                counts["judged right" if found == case["valid"] else "valid, but never generated"] += 1
    print(dict(counts))
    assert counts["schemas enforced"] >= 168
    assert counts["judged right"] >= 571


class Color(enum.Enum):
    RED = "red"
    QUOTED = 'a"b\\c'
    NUMBER = 3


PLAIN = (
    int,
    bool,
    None,
    Color,
    uuid.UUID,
    Literal["x", 1, None],
    Annotated[int, Field(ge=-5, lt=120)],
    Annotated[int, Field(multiple_of=7, ge=0)],
    Annotated[float, Field(gt=0, le=2.5)],
    Annotated[str, Field(pattern=r"^[A-Z]{2}\d{1,3}$")],
    Annotated[str, Field(min_length=1, max_length=8)],
)


def random_type(rng, depth=0):
    kind = rng.choice(["plain"] * 4 + (["list", "dict", "tuple", "optional", "union", "model"] if depth < 3 else []))
    inner = lambda: random_type(rng, depth + 1)  # noqa: E731
    if kind == "list":
        return Annotated[list[inner()], Field(min_length=rng.randint(0, 1), max_length=rng.randint(1, 3))]
    if kind == "dict":
        return Annotated[dict[str, inner()], Field(max_length=2)]
    if kind == "tuple":
        return tuple[inner(), inner()]
    if kind == "optional":
        return Optional[inner()]
    if kind == "union":
        return Union[inner(), inner()]
    return random_model(rng, depth + 1) if kind == "model" else rng.choice(PLAIN)


def random_model(rng, depth=0) -> type[BaseModel]:
    fields = {}
    for number in range(rng.randint(1, 4)):
        name = rng.choice(["name", "class_", "größe", "a b", "$ref", "x~y", "items"])
        optional = rng.random() < 0.3
        made = random_type(rng, depth)
        fields[f"f{number}"] = (
            (Optional[made], Field(None, alias=name + str(number)))
            if optional
            else (made, Field(alias=name + str(number)))
        )
    return create_model(f"Model{rng.randrange(10**6)}", **fields)


def generated(compiler, schema, tokenizer, draw):
    """A text by random logits, biased towards the end."""
    grammar, ids = compiler.compile(schema), []
    while not ids or ids[-1] not in tokenizer.ends:
        row = draw.gumbel(size=tokenizer.size).astype(np.float32) + CLOSERS * np.float32(3 + len(ids) / 50)
        grammar.mask(row)
        ids.append(int(row.argmax()))
        grammar.accept(ids[-1])
    return b"".join(map(tokenizer.piece, ids)).decode()


@pytest.mark.parametrize("block", range(10))
def test_answers_under_random_pydantic_models_are_valid(block):
    check(range(block * 20, block * 20 + 20), answers=5)


def check(seeds, answers):
    """Generate and validate; a model is used as pydantic gives its schema."""
    for seed in seeds:
        rng, draw = random.Random(seed), np.random.default_rng(seed)
        model = random_model(rng)
        schema = json.dumps(model.model_json_schema())
        for _ in range(answers):
            text = generated(COMPILER, schema, TOKENIZER, draw)
            try:
                model.model_validate_json(text)
            except ValidationError as error:
                raise AssertionError(f"seed {seed}: {text} is not valid under {schema}") from error
