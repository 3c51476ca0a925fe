"""Detection of dissatisfied follow-ups (SPEC F7): a small LSTM, run by ONNX Runtime.

The net's input is a word id and a mark per word; the mark encodes the text (question, answer or follow-up) of the word,
and which of the other two texts also have it. Vocabulary and thresholds are in the model's metadata.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import BundleError
from cogumi.core.types import Message

FILE = "escalation.onnx"
FORMAT = "cogumi-escalation-2"
"""Format name in a model's metadata; its number changes with `encode`, because the weights depend on it."""

MARKS = 13
"""Padding, then 4 marks each for question, answer and follow-up: none, one, the other or both others have the word."""

UNKNOWN = 1
"""Id of a word outside the vocabulary; 0 is padding, the words follow from 2."""

_WORD = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_CHARACTERS = 600
_LETTERS = 24
_LENGTHS = ((16, 8), (12, 28), (48, 16))
"""Tokens read from the beginning and the end of question, answer and follow-up."""


def last_turn(messages: Sequence[Message]) -> tuple[str, str, str] | None:
    """Question, answer and follow-up; None unless a non-empty user message follows an answer at the end."""
    talk = [message for message in messages if message.role in ("user", "assistant")]
    if len(talk) < 2 or talk[-1].role != "user" or talk[-2].role != "assistant" or not talk[-1].content.strip():
        return None
    question = next((message.content for message in reversed(talk[:-2]) if message.role == "user"), "")
    return question, talk[-2].content, talk[-1].content


def encode(turn: tuple[str, str, str], words: Mapping[str, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Word ids and marks [tokens] of a turn: the follow-up first (one token at least), then answer and question."""
    texts = [_tokens(text, first, last) for text, (first, last) in zip(turn, _LENGTHS, strict=True)]
    texts[2] = texts[2] or [""]
    known = [set(tokens) for tokens in texts]
    ids: list[int] = []
    marks: list[int] = []
    for part in (2, 1, 0):
        one, other = (known[k] for k in range(3) if k != part)
        for token in texts[part]:
            pieces = _pieces(token, words)
            ids += pieces
            marks += [1 + 4 * part + (token in one) + 2 * (token in other)] * len(pieces)
    return np.array(ids, dtype=np.int64), np.array(marks, dtype=np.int64)


def _tokens(text: str, first: int, last: int) -> list[str]:
    """Words, numbers and symbols, lower case, without accents; only the beginning and the end of a long text."""
    if len(text) > 2 * _CHARACTERS:
        text = text[:_CHARACTERS] + " " + text[-_CHARACTERS:]
    if not text.isascii():
        text = "".join(map(_plain, unicodedata.normalize("NFKD", text.replace("’", "'"))))
    found = _WORD.findall(text.lower())
    return found if len(found) <= first + last else found[:first] + found[-last:]


def _plain(character: str) -> str:
    """Remove accents; replace a pictograph by its Unicode name, as in "thumbs down sign"."""
    if character.isascii():
        return character
    if unicodedata.category(character) == "So":
        return f" {unicodedata.name(character, '')} "
    return "" if unicodedata.combining(character) else character


def _pieces(token: str, words: Mapping[str, int]) -> list[int]:
    """The token's id, or the ids of its greedy longest pieces."""
    token = "0" if token.isdigit() else token[:_LETTERS]
    ids, start = [], 0
    while start < len(token):
        end = next((e for e in range(len(token), start, -1) if token[start:e] in words), None)
        ids += [words[token[start:end]]] if end else []
        start = end or start + 1
    return ids or [UNKNOWN]


def describe(words: Sequence[str], threshold: float, sure: float) -> dict[str, str]:
    """The metadata of a model: format, vocabulary (ids from `UNKNOWN` + 1), thresholds."""
    return {"format": FORMAT, "words": "\n".join(words), "threshold": repr(threshold), "sure": repr(sure)}


def numbered(words: Sequence[str]) -> dict[str, int]:
    """Map words to ids."""
    return {word: row for row, word in enumerate(words, start=UNKNOWN + 1)}


class Escalation:
    """The net in a file, on one thread; thread-safe. Raises `BundleError` for another kind of file.

    `threshold` on P(dissatisfied) has the best accuracy; `sure` has few false positives.
    """

    def __init__(self, path: Path) -> None:
        from cogumi.engine.onnx import open_session

        self._session = open_session(path)
        metadata = self._session.get_modelmeta().custom_metadata_map
        if metadata.get("format") != FORMAT:
            found = metadata.get("format", "none")
            raise BundleError(f"{path} is not a {FORMAT} model (its format: {found}); build the bundle again")
        try:
            self.threshold, self.sure = float(metadata["threshold"]), float(metadata["sure"])
            self._words = numbered(metadata["words"].split("\n"))
        except (KeyError, ValueError) as error:
            raise BundleError(f"{path} lacks the metadata {error}; build the bundle again") from error

    def dissatisfied(self, messages: Sequence[Message]) -> float:
        """P(the last user message is dissatisfied with the previous answer); 0.0 without a previous answer."""
        turn = last_turn(messages)
        if turn is None:
            return 0.0
        ids, marks = encode(turn, self._words)
        return float(self._session.run(None, {"ids": ids[None], "marks": marks[None]})[0][0])
