"""Constrained decoding by JSON schema with llguidance: a mask over the vocabulary before every token.

llguidance follows JSON Schema draft 2020-12 and refuses features that it cannot enforce. Two rules are stricter than
the schema, so that answers end: white space is at most one space, or one line break with its indentation; and an object
has only properties that its schema lists, unless the schema mentions others or combines schemas.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.engine.protocol import Tokenizer

OPTIONS: Any = {"whitespace_pattern": r" ?|\n[ \t]{0,20}"}
LIMITS = LLParserLimits(verbose_errors=False)
MAX_CHARACTERS = 100_000
"""Most characters of a schema."""
MAX_EXACT = 2**53
"""Largest integer in a schema."""
MAX_MULTIPLE = 10_000
"""States of the automaton that counts multiples: 10,000 take half a second, 100,000 take six."""
MAX_REASON = 300
"""Most characters of llguidance's message quoted in an error."""
_COMBINED = frozenset({"allOf", "anyOf", "oneOf", "$ref"})
_MORE_PROPERTIES = frozenset({"additionalProperties", "patternProperties", "minProperties"})
_NOTES = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
        *("$defs", "definitions", "$schema", "$id", "$anchor", "$comment"),
    }
)
_SCHEMAS_BY_NAME = frozenset({"properties", "patternProperties", "$defs", "definitions"})


def closed_schema(schema: str) -> str:
    """A schema (JSON text) as it is enforced: without properties that it does not list. `RequestError` if invalid."""
    if len(schema) > MAX_CHARACTERS:
        raise RequestError(f"the JSON schema has {len(schema)} characters; keep it below {MAX_CHARACTERS}")
    try:
        known = json.loads(schema, parse_int=_exact)
        if isinstance(known, dict):
            known.pop("x-guidance", None)  # a schema could relax its enforcement by this key
        _check_multiples(known)
        return json.dumps(_closed(known), allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise _unreadable(error) from error


def lark_json(schema: str) -> str:
    """A schema as an expression of llguidance's Lark."""
    return f"%json {json.dumps(json.loads(closed_schema(schema)) | {'x-guidance': OPTIONS})}"


def _unreadable(error: Exception) -> RequestError:
    return RequestError(f"the JSON schema cannot be read ({error}); correct it")


class SchemaCompiler:
    """Compiles JSON schemas to grammars over a tokenizer's vocabulary.

    Thread-safe. The vocabulary is read at the first schema.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def compile(self, schema: str) -> SchemaGrammar:
        """Compile a schema (JSON text) to a grammar for one generation.

        Raises `RequestError` for an invalid schema, and for features that cannot be enforced, by name.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(closed_schema(schema), overrides=OPTIONS)
        except (ValueError, TypeError, RecursionError) as error:
            raise _unreadable(error) from error
        return self._matched(grammar)

    def compile_lark(self, lark: str) -> SchemaGrammar:
        """Compile a grammar in llguidance's Lark; `RequestError` as for `compile`."""
        return self._matched(LLMatcher.grammar_from_lark(lark))

    def _matched(self, grammar: str) -> SchemaGrammar:
        matcher = LLMatcher(self._vocabulary, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise RequestError(
                f"the JSON schema cannot be enforced ({_reason(matcher)}); remove that part or correct it"
            )
        matcher.compute_bitmask()
        if matcher.is_error():
            raise RequestError("no finite answer satisfies the JSON schema; correct it")
        return SchemaGrammar(matcher, self._tokenizer.size, sorted(self._tokenizer.ends))

    @cached_property
    def _vocabulary(self) -> LLTokenizer:
        return LLTokenizer(TokenizerWrapper(_Pieces(self._tokenizer)), eos_token=sorted(self._tokenizer.ends))


class SchemaGrammar:
    """`engine.sampling.Grammar` of a JSON schema; belongs to one generation."""

    def __init__(self, matcher: LLMatcher, size: int, ends: Sequence[int]) -> None:
        self._matcher, self._size, self._ends = matcher, size, ends

    def allows(self, token: int) -> bool:
        """Whether a token may come next."""
        if token in self._ends:  # the matcher does not treat end tokens as text
            return bool(self._matcher.is_accepting())
        return bool(self._matcher.validate_tokens([token]) == 1)

    def mask(self, logits: NDArray[np.float32]) -> None:
        """Set the logits of forbidden tokens to minus infinity, in place; `RequestError` if no token is allowed."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._size, bitorder="little")
        logits[allowed == 0] = -np.inf
        if np.isneginf(logits.max()):
            raise RequestError("the JSON schema allows no token of this vocabulary here; loosen it")

    def accept(self, token: int) -> None:
        """Advance by one token; `RequestError` if it is not allowed."""
        if not self.allows(token):
            raise RequestError(f"the JSON schema does not allow token {token} here")
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the JSON schema is too complex here ({_reason(self._matcher)}); simplify it")


class _Pieces:
    """A tokenizer in llguidance's interface."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._encode = tokenizer.encode
        self.tokens = [tokenizer.piece(token) for token in range(tokenizer.size)]
        self.special_token_ids = [token for token, piece in enumerate(self.tokens) if not piece]
        self.eos_token_id = tokenizer.eos

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _reason(matcher: LLMatcher) -> str:
    return " ".join(matcher.get_error().split())[:MAX_REASON]


def _exact(digits: str) -> int:
    """Parse an integer of a schema. Raises ValueError if llguidance, which uses doubles, would round it."""
    number = int(digits)
    if abs(number) > MAX_EXACT:
        raise ValueError(f"{digits} is beyond 2^53 and cannot be represented exactly")
    return number


def _check_multiples(schema: Any) -> None:
    """Raise `RequestError` if the automaton for all `multipleOf` together would take minutes to build."""
    common = 1
    rest = [schema]
    while rest:  # all values, because a reference may point anywhere
        value = rest.pop()
        if isinstance(value, (dict, list)):
            rest += value.values() if isinstance(value, dict) else value
        number = value.get("multipleOf") if isinstance(value, dict) else None
        if not isinstance(number, (int, float)) or isinstance(number, bool) or not 0 < number < math.inf:
            continue
        _, digits, places = Decimal(str(number)).as_tuple()
        common = math.lcm(common, int("".join(map(str, digits))) * 10 ** max(int(places), 0))
        if common > MAX_MULTIPLE:
            what = f"the JSON schema uses multipleOf {number}"
            raise RequestError(f"{what}; the least common multiple of all (digits only) must not exceed {MAX_MULTIPLE}")


def _closed(schema: Any) -> Any:
    """Forbid properties that the schema does not list; unchanged if it combines schemas.

    A closed part of a combination would forbid the properties of the other parts.
    """
    parts = list(_parts(schema))
    if not any(_combines(part) for part in parts):
        for part in parts:
            listed, needed = part.get("properties"), part.get("required", [])
            if isinstance(listed, dict) and not part.keys() & _MORE_PROPERTIES and listed.keys() >= set(needed):
                part["additionalProperties"] = False
    return schema


def _combines(part: dict[str, Any]) -> bool:
    """Whether several schemas apply to the same value."""
    combined = part.keys() & _COMBINED
    return "allOf" in combined or (bool(combined) and len(part.keys() - _NOTES - {"type"}) > 1)


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """A schema and all schemas inside it, without constants, names and examples."""
    if isinstance(value, list):
        for one in value:
            yield from _parts(one)
    if not isinstance(value, dict):
        return
    yield value
    for key, inner in value.items():
        if key in _SCHEMAS_BY_NAME and isinstance(inner, dict):
            yield from _parts(list(inner.values()))
        elif key not in ("const", "enum", "default", "examples"):
            yield from _parts(inner)
