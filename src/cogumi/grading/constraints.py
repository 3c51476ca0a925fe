"""Whether a text keeps the rules that its question sets: lengths, words, letters, layout (SPEC B3).

A rule is {"rule": name, ...arguments}, of the kind that a program can verify (Zhou et al. 2023, IFEval).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cogumi.core.text import normalise

Rule = Mapping[str, Any]
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_SENTENCE = re.compile(r"[^.!?\n]*[^\W_][^.!?\n]*(?:[.!?]+|$|\n)")
_BULLET = re.compile(r"^[ \t]*(?:[-*\u2022]|\d+[.)])[ \t]+\S", re.MULTILINE)


def words(text: str) -> list[str]:
    """The words of a text; "don't" and "well-known" are one each."""
    return _WORD.findall(text)


def _count(text: str, word: str) -> int:
    return sum(found.casefold() == word.casefold() for found in words(text))


def _is_json(text: str) -> bool:
    try:
        json.loads(text.strip().removeprefix("```json").removeprefix("```").removesuffix("```"))
    except (ValueError, RecursionError):
        return False
    return True


RULES: Mapping[str, tuple[tuple[str, ...], Callable[[str, Rule], bool]]] = {
    "words": (("least", "most"), lambda text, rule: rule["least"] <= len(words(text)) <= rule["most"]),
    "sentences": (("least", "most"), lambda text, rule: rule["least"] <= len(_SENTENCE.findall(text)) <= rule["most"]),
    "lines": (("least", "most"), lambda text, rule: rule["least"] <= len(text.strip().splitlines()) <= rule["most"]),
    "bullets": (("least", "most"), lambda text, rule: rule["least"] <= len(_BULLET.findall(text)) <= rule["most"]),
    "contains": (("word",), lambda text, rule: _count(text, rule["word"]) > 0),
    "excludes": (("word",), lambda text, rule: _count(text, rule["word"]) == 0),
    "times": (("word", "count"), lambda text, rule: _count(text, rule["word"]) == rule["count"]),
    "without": (("letters",), lambda text, rule: not set(rule["letters"].casefold()) & set(text.casefold())),
    "lower": ((), lambda text, rule: text == text.lower() != text.upper()),
    "upper": ((), lambda text, rule: text == text.upper() != text.lower()),
    "begins": (("text",), lambda text, rule: normalise(text).startswith(normalise(rule["text"]))),
    "ends": (("text",), lambda text, rule: normalise(text).endswith(normalise(rule["text"]))),
    "json": ((), lambda text, rule: _is_json(text)),
}
"""Name -> (arguments, whether a text keeps the rule)."""


def broken(text: str, rules: Sequence[Rule]) -> list[str]:
    """The rules that a text breaks, as JSON; an empty text breaks all."""
    text = text.strip()
    return [json.dumps(dict(rule)) for rule in rules if not (text and RULES[rule["rule"]][1](text, rule))]


def problem_of_rules(rules: Any) -> str | None:
    """The error in a list of rules, or None."""
    if not isinstance(rules, list) or not rules:
        return "rules of a check must be a non-empty list"
    for rule in rules:
        if not isinstance(rule, dict) or rule.get("rule") not in RULES:
            return f"a rule must be an object whose rule is one of {', '.join(RULES)}"
        arguments = RULES[rule["rule"]][0]
        if missing := [name for name in arguments if name not in rule]:
            return f"rule {rule['rule']} lacks {', '.join(missing)}"
        numbers = [rule[name] for name in arguments if name in ("least", "most", "count")]
        texts = [rule[name] for name in arguments if name in ("word", "letters", "text")]
        if not all(type(n) is int and n >= 0 for n in numbers) or not all(isinstance(t, str) and t for t in texts):
            return f"rule {rule['rule']} needs whole numbers and texts"
    return None
