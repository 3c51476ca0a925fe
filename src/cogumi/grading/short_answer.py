"""Does a sentence name the right answer, and nothing but it? (SPEC B3)

`judge` looks for mentions: runs of whole words that equal an accepted wording or a rival, ignoring letter case,
accents, punctuation and Markdown. A mention is a claim unless it is part of a longer name ("Southeast Asia",
"Australia's", "Paris-based"), negated, in a question, on the right of a comparison, or an echo of what was asked. The
output is right if it claims an accepted wording, claims no rival, and does not decline. In doubt it is wrong:
confidence is fitted on these verdicts, and an answer that hedges between two names must not count as known.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cogumi.core.text import declines_somewhere

_WORD = re.compile(r"\d+(?:[.,]\d+)*|[^\W\d_]+(?:['.][^\W\d_]+)*|[^\W_]+")
_EMPHASIS = re.compile(r"(?<!\w)[*_`]+|[*_`]+(?!\w)|<think>(?:(?!<think>).)*?</think>", re.DOTALL)
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)|\n+")
_CLAUSE_END = re.compile(r"[,;:.!?\n()]")
_JOINED = re.compile(r"[-\u2010\u2011_@&/\\+]")
"""A sign that joins two words to one thing, or two candidates, where no space parts them from it."""

LONGEST = 2_000
"""Characters of the longest output that can be a short answer, without its `<think>` block."""
_ARTICLES = {"a", "an", "the"}
_COPULA = {"is", "are", "was", "were", "be", "it's", "that's", "called", "named", "answer", "has", "as"}
_STATES = {"is", "are", "was", "were"}
_NEGATION = {
    "not", "never", "no", "neither", "nor", "cannot", "except", "unlike", "without", "instead", "rather",
}  # fmt: skip
_WRONG = {"wrong", "incorrect", "false"}
_CONTRAST = {"but", "it's", "rather"}
_MAGNITUDES = {"hundred", "thousand", "million", "billion", "trillion"}
_NUMBER_WORDS = _MAGNITUDES | {
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "twenty", "thirty", "forty", "fifty",
    "sixty",
    "seventy", "eighty", "ninety",
}  # fmt: skip
_OPENERS = _ARTICLES | _COPULA | _NEGATION | {
    "in", "on", "at", "of", "by", "from", "to", "for", "with", "and", "or", "either", "yes", "its", "his", "her",
    "their", "this", "that", "which", "it", "so", "because", "who", "where", "both", "than", "final", "does", "i",
    "you",
    "he", "she", "they", "lives", "likes", "owns", "works", "element", "country", "capital", "currency",
}  # fmt: skip
"""Words that may stand beside a name with a capital letter and are not part of it."""


@dataclass(frozen=True, slots=True)
class _Token:
    word: str
    spelled: str
    capital: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Text:
    """A text without accents and emphasis, and its words."""

    text: str
    tokens: tuple[_Token, ...]

    @classmethod
    def of(cls, raw: str) -> _Text:
        text = _fold(_EMPHASIS.sub(" ", raw))
        shouted = text.isupper()
        return cls(
            text,
            tuple(
                _Token(
                    m[0].replace(",", "") if m[0][0].isdigit() else m[0].casefold().replace(".", ""),
                    m[0].replace(".", ""),
                    m[0][0].isupper() and not shouted,
                    m.start(),
                    m.end(),
                )
                for m in _WORD.finditer(text)
            ),
        )

    def words(self) -> tuple[str, ...]:
        return tuple(token.word for token in self.tokens)

    def between(self, left: int, right: int) -> str:
        """The characters between two words; what stands outside the text counts as a line break."""
        if left < 0 or right >= len(self.tokens):
            return "\n"
        return self.text[self.tokens[left].end : self.tokens[right].start]

    def before(self, at: int) -> list[str]:
        """The words of the clause before a word, nearest first."""
        found = []
        while not _CLAUSE_END.search(self.between(at - 1, at)):
            at -= 1
            found.append(self.tokens[at].word)
        return found

    def after(self, at: int) -> list[str]:
        """The words of the clause after a word."""
        found = []
        while not _CLAUSE_END.search(self.between(at, at + 1)):
            at += 1
            found.append(self.tokens[at].word)
        return found


@dataclass(frozen=True, slots=True)
class _Mention:
    """Words `first` to `last` equal a wording; `right` if an accepted one."""

    first: int
    last: int
    right: bool


def _fold(text: str) -> str:
    text = unicodedata.normalize("NFD", text.replace("\u2019", "'").replace("\u2212", "-"))
    return "".join(c for c in text if not "\u0300" <= c <= "\u036f")


def _wording(text: str) -> tuple[str, ...]:
    words = _Text.of(text).words()
    return words[1:] if len(words) > 1 and words[0] in _ARTICLES else words


def _occurrences(words: Sequence[str], wanted: Sequence[str]) -> Iterator[int]:
    size = len(wanted)
    return (at for at in range(len(words) - size + 1) if size and tuple(words[at : at + size]) == tuple(wanted))


def _occurs(wanted: Sequence[str], words: Sequence[str]) -> bool:
    return any(True for _ in _occurrences(words, wanted))


def _mentions(text: _Text, answers: Sequence[str], rivals: Sequence[str]) -> list[_Mention]:
    """The mentions in a text; one inside a longer mention is left out."""
    words = text.words()
    wordings = {_wording(rival): False for rival in rivals} | {_wording(answer): True for answer in answers}
    spelled = {_wording(text): text for text in (*rivals, *answers)}
    found = [
        _Mention(at, at + len(wanted) - 1, right)
        for wanted, right in wordings.items()
        for at in _occurrences(words, wanted)
        if _same_case(text.tokens[at], spelled[wanted])
        and not any(_parted(text, i) for i in range(at, at + len(wanted) - 1))
    ]
    return [
        m
        for m in found
        if not any(n.first <= m.first and m.last <= n.last and n.last - n.first > m.last - m.first for n in found)
    ]


def _parted(text: _Text, at: int) -> bool:
    """Whether a clause ends between a word and the next; "St." does not end one."""
    gap = text.between(at, at + 1)
    return _CLAUSE_END.search(gap.removeprefix(".") if len(text.tokens[at].word) <= 2 else gap) is not None


def _same_case(token: _Token, wording: str) -> bool:
    """Whether a word may stand for a wording: one or two letters must have the same case ("US", not "us")."""
    return not 1 <= len(wording) <= 2 or wording.isdigit() or token.spelled == wording


def _extended(text: _Text, mention: _Mention) -> bool:
    """Whether a mention is a part of a longer name or number."""
    start, end = text.tokens[mention.first].start, text.tokens[mention.last].end
    left, right = text.text[max(start - 2, 0) : start], text.text[end : end + 2]
    number = text.tokens[mention.first].word[0].isdigit()
    if number and (re.search(r"(?:^|[^\w)\s])-$|^-$|\s-$", left) or right[:1] == "%"):
        return True
    if (re.search(r"\w.$", left) and _JOINED.match(left[-1])) or re.match(r"[-\u2010\u2011_@&/\\+.']\w", right):
        return True
    before, after = text.between(mention.first - 1, mention.first), text.between(mention.last, mention.last + 1)
    if before and not before.strip(" \t"):
        previous = text.tokens[mention.first - 1]
        if previous.capital and previous.word not in _OPENERS:
            return True
        if previous.word in _NUMBER_WORDS and text.tokens[mention.first].word in _NUMBER_WORDS | {previous.word}:
            return True
    if after and not after.strip(" \t"):
        following = text.tokens[mention.last + 1]
        if following.capital and following.word not in _OPENERS:
            return True
        if following.word in _MAGNITUDES or (following.word in _NUMBER_WORDS and not number):
            return True
    return _of_a_name(text, mention.first)


def _of_a_name(text: _Text, first: int) -> bool:
    """Whether "Name of" or "Name of the" stands before: "Gulf of Mexico"."""
    at = first - 1
    if at >= 0 and text.tokens[at].word == "the":
        at -= 1
    if at < 1 or text.tokens[at].word != "of" or _CLAUSE_END.search(text.between(at - 1, at)):
        return False
    name = text.tokens[at - 1]
    return name.capital and name.word not in _OPENERS


def _negated(text: _Text, mention: _Mention) -> bool:
    for word in text.before(mention.first):
        if word in _CONTRAST and word != "rather":
            break
        if word in _NEGATION or word.endswith("n't"):
            return True
    after = text.after(mention.last)[:3]
    if after and after[0].endswith("n't"):
        return True
    return len(after) > 1 and after[0] in _COPULA | {"does"} and after[1] in _NEGATION | _WRONG


def _asked(text: _Text, mention: _Mention) -> bool:
    """Whether the sentence of a mention is a question."""
    end = _SENTENCE_END.search(text.text, text.tokens[mention.last].end)
    return end is not None and "?" in end[0]


def _compared(text: _Text, mention: _Mention) -> bool:
    """Whether a mention is what something else is compared with."""
    before = [word for word in text.before(mention.first) if word not in _ARTICLES]
    return bool(before) and before[0] == "than"


def _comparative(text: _Text, mention: _Mention) -> str:
    """The word before "than" of a mention in a comparison; empty if there is none."""
    return next(iter([word for word in text.before(mention.first) if word not in _ARTICLES][1:]), "")


def _hedged(text: _Text, mention: _Mention, mentions: Sequence[_Mention]) -> bool:
    """Whether a mention is one of two alternatives, of which the other is not another accepted wording."""
    if "either" in text.before(mention.first):
        return True
    for step, at in ((1, mention.last + 1), (-1, mention.first - 1)):
        if not 0 <= at < len(text.tokens):
            continue
        gap = text.between(at - 1, at) if step > 0 else text.between(at, at + 1)
        other = at + step
        if "/" in gap or "&" in gap:
            other = at
        elif text.tokens[at].word not in {"or", "and", "nor"} or "." in gap or "\n" in gap:
            continue
        while 0 <= other < len(text.tokens) and text.tokens[other].word in _ARTICLES:
            other += step
        if not 0 <= other < len(text.tokens):
            return True
        if any(m.right and m.first <= other <= m.last for m in mentions):
            continue
        if text.tokens[at].word != "and" or text.tokens[other].capital:
            return True
    return False


def _asking_sentence(question: str) -> tuple[str, ...]:
    """The words of the sentence that asks: the last one with a question mark, or the last one."""
    parts = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", question) if part.strip()]
    return _Text.of(next((p for p in reversed(parts) if p.endswith("?")), parts[-1] if parts else "")).words()


def _echoed(text: _Text, mention: _Mention, asking: Sequence[str]) -> bool:
    """Whether a mention repeats words of the question without stating them as the answer.

    Stated is: the whole output or its first phrase ("Macao."), after a copula or a colon ("... is Macao"), or before a
    copula that leads to other words of the question ("A horse is bigger").
    """
    if not _occurs(text.words()[mention.first : mention.last + 1], asking):
        return False
    before = [word for word in text.before(mention.first) if word not in _ARTICLES]
    after = text.after(mention.last)
    if before:
        return before[0] not in _COPULA
    if mention.first == 0 or set(text.words()[: mention.first]) <= _ARTICLES:
        if not after:
            return False
        rest = set(after[1:]) - _ARTICLES - _OPENERS | set(after[1:]) & {"capital", "currency", "element", "country"}
        return after[0] not in _STATES or not rest & set(asking)
    return bool(after) or text.between(mention.first - 1, mention.first).strip() not in {":", "=", ".", "-"}


def _other_number(text: _Text, answers: Sequence[str], asking: Sequence[str]) -> str | None:
    """A number that the output claims beside a numeric answer."""
    wanted = {word for answer in answers for word in _wording(answer)}
    if not any(word[0].isdigit() for word in wanted):
        return None
    return next((t.word for t in text.tokens if t.word[0].isdigit() and t.word not in wanted | set(asking)), None)


def judge(output: str, question: str, answers: Sequence[str], rivals: Sequence[str] = ()) -> tuple[bool, str]:
    """Whether an output answers `question` with one of `answers` and with no rival; and the reason if it does not."""
    expected = f"expected: {answers[0]}"
    if declines_somewhere(output):
        return False, f"{expected}, found an abstention"
    text, asking = _Text.of(output), _asking_sentence(question)
    if len(text.text) > LONGEST:
        return False, f"{expected}, found more than {LONGEST} characters"
    if text.words() in (asking, _Text.of(question).words()):
        return False, f"{expected}, found the question"
    mentions = [m for m in _mentions(text, answers, rivals) if not _asked(text, m) and not _negated(text, m)]
    compared = {m for m in mentions if _compared(text, m)}
    for rival in mentions:
        if rival.right or (rival not in compared and _echo_of_rival(text, rival, asking)):
            continue
        if not (rival in compared and _comparative(text, rival) in asking):
            return False, f"{expected}, found {' '.join(text.words()[rival.first : rival.last + 1])} too"
    claims = [m for m in mentions if m.right and m not in compared and not _extended(text, m)]
    if not any(_occurs(_wording(rival), asking) for rival in rivals):  # else the question offers a choice
        claims = [m for m in claims if not _echoed(text, m, asking)]
    if not claims:
        return False, expected
    if any(_hedged(text, m, mentions) for m in claims):
        return False, f"{expected}, found several candidates"
    if number := _other_number(text, answers, asking):
        return False, f"{expected}, found {number} too"
    return True, ""


def _echo_of_rival(text: _Text, rival: _Mention, asking: Sequence[str]) -> bool:
    """Whether a rival is only repeated from the question, with the word before it ("the capital of Guinea is ...")."""
    size = rival.last - rival.first + 1
    words = text.words()
    run = words[rival.first - 1 : rival.last + 1] if rival.first else ()
    return len(run) == size + 1 and run[0] not in _COPULA | _ARTICLES and _occurs(run, asking)
