"""Which option an answer selects: by a letter in every usual wording, or by the option's text (SPEC B3).

The last commitment counts ("Answer: B", "I choose B", a boxed B, a last line "B", "The answer is blue"). Two different
options in one commitment ("A or B") are no choice. Without a commitment a text selects the only option that it
mentions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cogumi.core.text import abstains, normalise, without_thinking

_OPEN = r"[\s(\[{*_\"'`$:=-]*(?:\\boxed\{|\\text(?:bf)?\{|\\mathrm\{)*[\s(*_]*"
_CLOSE = r"[\s)\]}*_\"'`$.:]*"
_ALONE = re.compile(rf"(?i:\W*(?:option|choice|answer)\b)?{_OPEN}([A-Za-z]){_CLOSE}")
_FIRST = re.compile(r"^[\s(\[*_]*([A-Za-z])[*_]*[)\].:](?:[*_\s]|$)", re.MULTILINE)
_BOXED = re.compile(r"\\boxed\{(?:\\text(?:bf)?\{|\\mathrm\{)?\s*([^{}]*?)\s*\}")
_MARK = re.compile(
    r"\b(?i:(?:answer|choice|option|solution)\b[*_]*(?:\s+(?i:is|are|would\s+be|should\s+be|must\s+be))?"
    r"|(?:choose|chose|pick|select|go\s+with|going\s+with))[*_]*\s*[:=]?\s*"
    r"(?i:(?:clearly|therefore|thus|most\s+likely|probably)\s+)?(?i:(?:the\s+)?(?:option|choice|letter|answer)\s+)?"
)
_LETTER = re.compile(rf"{_OPEN}([A-Za-z])(?![\w'\u2019+#]|-\w)")
_WORD_AFTER = re.compile(r"[*_)\]}\"'$]*\s+([a-z]+)")
_BEFORE_REASON = {"because", "since", "as", "for", "and", "which", "so", "due", "but", "by", "is", "it", "with", "in"}
"""Words that may follow a letter that is itself a word: "The answer is A because ..." but not "... is a car"."""
_ANOTHER = re.compile(
    rf"{_CLOSE}(?:\s*(?:\bor\b|\band\b|/|,|&)\s*)(?i:option\s+|choice\s+)?[(\[*_\"']*([A-Za-z])(?![\w'\u2019])"
)


def chosen(text: str, options: Sequence[str]) -> int | None:
    """Index of the option that a text selects; None if it selects none, or two. Without options any letter counts."""
    text = without_thinking(text).strip()
    wanted = [normalise(option) for option in options]
    if (whole := _whole(text, options, wanted)) is not None or abstains(text):
        return whole
    if _ALONE.fullmatch(text):
        return None
    if (found := _last_commitment(text, options, wanted)) is not None:
        return found if found >= 0 else None
    first = {_index(letter, options) for letter in _FIRST.findall(text)}
    if len(first) == 1 and (only := first.pop()) is not None:
        return only
    mentioned = _mentioned(normalise(text), wanted)
    return mentioned.pop() if len(mentioned) == 1 else None


def gold(answer: str, options: Sequence[str]) -> int | None:
    """Index of the right option: `answer` is its text, its letter in either case, or its index from 0."""
    whole = _whole(answer.strip(), options, [normalise(option) for option in options])
    if whole is None and answer.strip().isdecimal() and int(answer) < len(options):
        return int(answer)
    return whole


def same_option(one: int, other: int, options: Sequence[str]) -> bool:
    """Whether two indices select the same option; options with the same text are one."""
    return one == other or (max(one, other) < len(options) and normalise(options[one]) == normalise(options[other]))


def _whole(text: str, options: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Index of the option that is all of a text: its letter or its text.

    A letter is the text of an option only where all options are letters ("Which letter comes first?").
    """
    alone = _ALONE.fullmatch(text)
    index = _index(alone[1], options) if alone else None
    if index is None or all(len(option) == 1 for option in wanted):
        said = normalise(text)
        return wanted.index(said) if said in wanted else index
    return index


def _index(letter: str, options: Sequence[str]) -> int | None:
    index = ord(letter.upper()) - ord("A")
    return index if not options or index < len(options) else None


def _last_commitment(text: str, options: Sequence[str], wanted: Sequence[str]) -> int | None:
    """Index of the option of the last commitment: -1 if it names two, or none of them; None without one."""
    found = [*_boxed(text, options, wanted), *_marked(text, options, wanted)]
    lines = text.split("\n")
    if len(lines) > 1 and (alone := _ALONE.fullmatch(lines[-1])):
        found.append((len(text), _or_none(_index(alone[1], options))))
    return max(found)[1] if found else None


def _or_none(index: int | None) -> int:
    return -1 if index is None else index


def _boxed(text: str, options: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
    for match in _BOXED.finditer(text):
        whole = _whole(match[1], options, wanted)
        if whole is not None or _ALONE.fullmatch(match[1]):
            yield match.start(), _or_none(whole)


def _marked(text: str, options: Sequence[str], wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Position and index of each option that stands after "answer", "option" or "I choose"."""
    for mark in _MARK.finditer(text):
        rest = text[mark.end() : mark.end() + 4 * max(map(len, options), default=0) + 80]
        if (index := _begins_with(rest, wanted)) is not None:
            yield mark.start(), index
        elif (letter := _LETTER.match(rest)) and _is_letter(letter[1], rest[letter.end() :]):
            another = _ANOTHER.match(rest, letter.end())
            two = another is not None and _is_letter(another[1], rest[another.end() :])
            yield mark.start(), -1 if two else _or_none(_index(letter[1], options))


def _is_letter(letter: str, after: str) -> bool:
    """Whether a single letter names an option, and is no word ("a car", "I think")."""
    word = _WORD_AFTER.match(after)
    if word and word[1] not in _BEFORE_REASON:
        return letter.isupper() and letter not in "AI"
    return letter != "a" or word is not None or after[:1] != " "


def _begins_with(rest: str, wanted: Sequence[str]) -> int | None:
    """The longest option whose text begins `rest`, up to the end of a word."""
    rest = rest.lstrip(" \t\n:*_\"'`$").split("\n")[0]
    lines = {normalise(rest), normalise(rest.lstrip("("))}
    fits = [
        (len(option), -i)
        for line in lines
        for i, option in enumerate(wanted)
        if option and not _is_letter_of(option, wanted) and _starts(line, option)
    ]
    return -max(fits)[1] if fits else None


def _is_letter_of(option: str, wanted: Sequence[str]) -> bool:
    """Whether an option's text is a letter that names an option, so that it stands for that one."""
    return len(option) == 1 and option.isascii() and option.isalpha() and _index(option, wanted) is not None


def _starts(line: str, option: str) -> bool:
    if not line.startswith(option):
        return False
    return _edge(option[-1], line[len(option) : len(option) + 2])


def _edge(inner: str, outer: str) -> bool:
    """Whether a mention may end between these characters: not inside a word, a number or an operator."""
    if not outer:
        return True
    if inner.isalnum():
        return not (outer[0].isalnum() or outer[0] in "_+#" or (outer[0] in ".,'-" and outer[1:2].isalnum()))
    return outer[0].isspace() or outer[0] in ".,;:!?)\"'" or (outer[0].isalnum() and inner not in "+-<>=*/^")


def _mentioned(said: str, wanted: Sequence[str]) -> set[int]:
    """Indices of the options that a normalised text mentions and does not deny; one inside a longer one is left out."""
    spans = [
        (start, start + len(option), i)
        for i, option in enumerate(wanted)
        if option and option not in wanted[:i]
        for start in _places(said, option)
        if not _DENIED.search(said, 0, start)
    ]
    return {
        i for start, end, i in spans if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
    }


_DENIED = re.compile(r"(?:\bnot|n't)\s+(?:(?:a|an|the)\s+)?\Z")


def _places(said: str, option: str) -> Iterator[int]:
    start = said.find(option)
    while start >= 0:
        end = start + len(option)
        if _edge(option[0], said[max(start - 2, 0) : start][::-1]) and _edge(option[-1], said[end : end + 2]):
            yield start
        start = said.find(option, start + 1)
