"""Lexical check before the cached answer of a similar question is reused (SPEC F12).

The cosine of embeddings hardly separates "Who won in 1998?" from "Who won in 1999?". `conflict` detects differing
numbers, names, negations, question types and antonyms. The word lists are English; in other languages only numbers,
symbols and names are compared. `pair_features` gives the same observations as numbers, for a learned check.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from itertools import pairwise, zip_longest
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")
_WORD = re.compile(r"\w+(?:['’.,]\w+)*")
_NUMBER = re.compile(r"\d+(?:[.,:/]\d+)*")
_CODE = re.compile(r"[{}\[\]<>|\\`=^]|\w\((?!s\))|;\s*\n|\n\s+\S")
_SYMBOL = re.compile(r"[+×÷*%≤≥≠√±°$€£#@]|(?<=\d)\s*[-−–/]\s*(?=\d)")
_MIXED = re.compile(r".[A-Z]|[a-zA-Z]\d|\d[a-zA-Z]")
_QUOTED = re.compile(r"[\"“]([^\"”]+)[\"”]|(?<!\w)'([^']+)'(?!\w)")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CARDINALS = "two three four five six seven eight nine ten eleven twelve"  # "one" is a pronoun as often as a number
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth"
_NUMERALS = {word: str(value) for value, word in enumerate(_CARDINALS.split(), 2)}
_NUMERALS |= {word: f"{value}." for value, word in enumerate(_ORDINALS.split(), 1)}
_NEGATIONS = _set("not no never without none nobody nothing nowhere neither nor cannot except unable")
_AUXILIARIES = _set(
    "is are was were am be do does did can could will would shall should may might must has have had isn't aren't "
    "wasn't don't doesn't didn't can't couldn't won't wouldn't shouldn't hasn't haven't"
)
_KINDS = {"who": "who", "whom": "who", "whose": "who", "when": "when", "where": "where", "why": "why"}
_SHORT = {f"{word}{end}": word for word in ("what", "who", "where", "when", "how") for end in ("s", "'s", "'re")}
_AMOUNTS = _set("many much long old far often tall high big large fast deep heavy late soon likely")
_PLAIN = (_AUXILIARIES - _NEGATIONS) | _set(
    "a an the of to in on at for with by from as and or but if than then so that this these those it its there i you "
    "us he she we they me my your his her our their one's i'm i've i'd i'll what which how who whom whose when where "
    "why some any all most just also very really ever please best good great way ways thing things get make people"
)
_OPPOSITES = (
    "increase/decrease raise/lower more/less more/fewer most/least best/worst better/worse good/bad highest/lowest "
    "high/low maximum/minimum max/min largest/smallest biggest/smallest bigger/smaller large/small big/small "
    "longest/shortest long/short longer/shorter fastest/slowest fast/slow oldest/youngest old/young old/new "
    "first/last before/after start/stop start/end begin/end open/close opened/closed enable/disable on/off up/down "
    "in/out into/from buy/sell gain/lose win/lose import/export encode/decode encrypt/decrypt install/uninstall "
    "add/remove add/subtract multiply/divide push/pull left/right hot/cold hottest/coldest warm/cold cheap/expensive "
    "cheapest/expensive legal/illegal possible/impossible true/false right/wrong advantages/disadvantages "
    "advantage/disadvantage pros/cons benefits/risks strengths/weaknesses love/hate like/dislike male/female man/woman "
    "men/women boy/girl boys/girls husband/wife father/mother brother/sister son/daughter king/queen boyfriend/"
    "girlfriend his/her input/output upload/download public/private always/never everybody/nobody everything/nothing "
    "positive/negative alive/dead friend/enemy above/below over/under inside/outside north/south east/west "
    "northern/southern eastern/western past/future ancient/modern day/night morning/evening summer/winter rich/poor "
    "strong/weak hard/easy hardest/easiest difficult/easy safe/dangerous healthy/unhealthy happy/sad"
)
_PAIRS = tuple(tuple(pair.split("/")) for pair in _OPPOSITES.split())
_LONGEST = 64
"""Number of words whose order is compared: the comparison takes quadratic time."""

KINDS = ("code", "numbers", "symbols", "names", "negation", "question", "order", "opposites")
FEATURES = (
    *("cosine", "words", "content", "missing", "extra", "longest_missing", "longest_extra", "trigrams"),
    *("bigrams", "order", "length", *KINDS),
)


def conflict(question: str, cached: str) -> str | None:
    """The reason why the answer to `cached` must not be reused for `question`; None without a conflict."""
    return next((f"{kind}: {reason}" for kind, reason in _conflicts(question, cached)), None)


def pair_features(question: str, cached: str, cosine: float) -> NDArray[np.float64]:
    """Features of a pair of questions [len(FEATURES)]: shares in [0, 1], lengths in tens of characters, flags."""
    a, b = _words(question), _words(cached)
    content_a, content_b = ({_stem(w) for w in words if w not in _PLAIN} for words in (a, b))
    missing, extra = content_a - content_b, content_b - content_a
    found = {kind for kind, _ in _conflicts(question, cached)}
    return np.array(
        [
            cosine,
            _overlap(set(a), set(b)),
            _overlap(content_a, content_b),
            len(missing) / max(len(content_a), 1),
            len(extra) / max(len(content_b), 1),
            max(map(len, missing), default=0) / 10,
            max(map(len, extra), default=0) / 10,
            _overlap(_grams(" ".join(a), 3), _grams(" ".join(b), 3)),
            _overlap(set(pairwise(a)), set(pairwise(b))),
            difflib.SequenceMatcher(None, a[:_LONGEST], b[:_LONGEST], autojunk=False).ratio(),
            min(len(a), len(b)) / max(len(a), len(b), 1),
            *(float(kind in found) for kind in KINDS),
        ]
    )


def _conflicts(one: str, other: str) -> Iterator[tuple[str, str]]:
    """Conflicts as (kind, difference), the strongest evidence first."""
    if one != other and (_CODE.search(one) or _CODE.search(other)):
        yield "code", "answers about code are reused only for identical text"
    a, b = _words(one), _words(other)
    for kind, x, y in (
        ("numbers", _numbers(a), _numbers(b)),
        ("symbols", _symbols(one), _symbols(other)),
        ("negation", [_negated(a)], [_negated(b)]),
        ("question", [_opening(a)], [_opening(b)]),
    ):
        if x != y:
            yield kind, f"{' '.join(x) or 'none'} versus {' '.join(y) or 'none'}"
    if name := _missing_name(one, other) or _missing_name(other, one):
        yield "names", f"only one question mentions '{name}'"
    if _swapped(one, other, a, b):
        yield "order", "the same words in a different order"
    set_a, set_b = set(a), set(b)
    for this, that in _PAIRS:
        if {(this in set_a, that in set_a), (this in set_b, that in set_b)} == {(True, False), (False, True)}:
            yield "opposites", f"{this} versus {that}"


def _words(text: str) -> list[str]:
    return [_SHORT.get(word, word) for word in _WORD.findall(text.lower().replace("’", "'"))]


def _numbers(words: list[str]) -> list[str]:
    """Numbers in the order of the text: 7 - 5 differs from 5 - 7."""
    found = []
    for word in words:
        if word in _NUMERALS:
            found.append(_NUMERALS[word])
        else:
            found += [number.replace(",", "") for number in _NUMBER.findall(word)]
    return found


def _symbols(text: str) -> list[str]:
    return [symbol.strip() for symbol in _SYMBOL.findall(text)]


def _negated(words: list[str]) -> str:
    return "negated" if any(w in _NEGATIONS or w.endswith("n't") for w in words) else "not negated"


def _opening(words: list[str]) -> str:
    """The expected kind of answer, by the first interrogative or auxiliary word."""
    for word, following in zip_longest(words, words[1:]):
        if word in _KINDS:
            return _KINDS[word]
        if word == "how" and following in _AMOUNTS:
            return f"how {following}"
        if word in ("what", "which", "how"):
            return "what or how"
        if word in _AUXILIARIES:
            return "yes or no"
    return "what or how"  # as in "Tell me .."


def _missing_name(text: str, other: str) -> str | None:
    """A name in `text` that `other` lacks: capitals inside a sentence or word, single letters, quotations."""
    known, exact = _words(other), set(_WORD.findall(other))
    stems = {_stem(word) for word in known}
    for match in _WORD.finditer(text):
        word = match[0].replace("’", "'")
        before = text[: match.start()].rstrip(" \t\"'“(")
        inside = before and before[-1] not in ".?!:\n"
        name = (inside and word[0].isupper()) or (len(word) == 1 and word.isalpha()) or _MIXED.search(word)
        if name and word.lower() not in _PLAIN and _stem(word.lower()) not in stems:
            return word
        if word.isupper() and len(word) > 1 and word.lower() in _PLAIN and word not in exact:
            return word  # US versus us, WHO versus who
    for quoted in _QUOTED.finditer(text):
        phrase = _words(quoted[1] or quoted[2])
        if phrase and not any(known[i : i + len(phrase)] == phrase for i in range(len(known))):
            return " ".join(phrase)
    return None


def _swapped(one: str, other: str, a: list[str], b: list[str]) -> bool:
    """Whether shared content words or names are swapped: "dollars to euros" versus "euros to dollars"."""
    content_a, content_b = (list(dict.fromkeys(_stem(w) for w in words if _placed(w))) for words in (a, b))
    if content_a != content_b and sorted(content_a) == sorted(content_b):
        return True
    capital = {_stem(word.lower()) for text in (one, other) for word in _WORD.findall(text) if word[0].isupper()}
    names_a, names_b = (
        [w for w in x if w in capital and w in y] for x, y in ((content_a, content_b), (content_b, content_a))
    )
    return names_a != names_b


def _placed(word: str) -> bool:
    """Whether the position of a word matters; adverbs can move freely."""
    return word not in _PLAIN and not word.endswith("ly")


def _stem(word: str) -> str:
    """Strip possessive and plural endings: "trump's" becomes "trump"."""
    word = word.removesuffix("'s").removesuffix("'")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _grams(text: str, n: int) -> set[str]:
    return {text[i : i + n] for i in range(len(text) - n + 1)}


def _overlap(a: set[T], b: set[T]) -> float:
    """Jaccard index; two empty sets are equal."""
    return len(a & b) / len(a | b) if a or b else 1.0
