"""OpenAI's interface from the client's side: requests in its words, and its chunks read as tokens (SPEC E5)."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cogumi.core.errors import RequestError
from cogumi.core.types import Reply, Request, Token, Usage
from cogumi.engine.protocol import Tokenizer

BEST = 5
"""Best tokens asked for with every token: the most that OpenAI's own completions give."""
_BYTES = re.compile(r"\\x([0-9a-fA-F]{2})")


def body_of(request: Request, model: str) -> dict[str, Any]:
    """A request in OpenAI's words: to chat if it has `messages`, else to completions.

    Raises `RequestError` for what these words do not know.
    """
    if request.grammar is not None:
        raise RequestError("OpenAI's API knows no grammars; give a JSON schema, or use the llama engine")
    best = max(BEST, request.logprobs)
    asked = {
        "stop": list(request.stop) or None,
        "seed": request.seed,
        "logit_bias": {str(token): bias for token, bias in request.logit_bias.items()} or None,
        "presence_penalty": request.presence_penalty or None,
        "frequency_penalty": request.frequency_penalty or None,
        "user": request.user,
    }
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | {key: value for key, value in asked.items() if value is not None}
    if request.prompt is not None:
        if not request.prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if request.json_schema is not None:
            raise RequestError("OpenAI's API knows JSON schemas in chats only; give messages, not a prompt")
        prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
        return body | {"prompt": prompt, "logprobs": best}
    messages = [{"role": message.role, "content": message.content} for message in request.messages]
    body |= {"messages": messages, "logprobs": True, "top_logprobs": best}
    if request.json_schema is not None:
        try:
            schema = {"name": "answer", "schema": json.loads(request.json_schema), "strict": True}
        except ValueError as error:
            raise RequestError(f"the JSON schema is not JSON ({error}); correct it") from error
        body["response_format"] = {"type": "json_schema", "json_schema": schema}
    return body


class Entry(NamedTuple):
    """One token as a server tells of it: bytes, log-probability (None: not told), and the best, best first."""

    piece: bytes
    logprob: float | None
    best: tuple[tuple[bytes, float], ...]


def entries(logprobs: Mapping[str, Any] | None) -> list[Entry]:
    """The tokens of a choice's `logprobs`, in the shape of chat (`content`) or of completions (`tokens`)."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            Entry(_bytes(told), told["logprob"], _best((_bytes(one), one["logprob"]) for one in told["top_logprobs"]))
            for told in logprobs["content"] or ()
        ]
    texts = logprobs.get("tokens") or []
    tops = logprobs.get("top_logprobs") or [None] * len(texts)
    told = zip(texts, logprobs["token_logprobs"], tops, strict=True)
    return [
        Entry(_piece(text), logprob, _best((_piece(one), value) for one, value in (top or {}).items()))
        for text, logprob, top in told
    ]


def all_greedy(told: Sequence[Entry]) -> bool | None:
    """Whether each token is the likeliest at its place; None where a server does not tell the best ones."""
    if any(entry.logprob is None or not entry.best for entry in told):
        return None
    return all(entry.logprob >= entry.best[0][1] for entry in told if entry.logprob is not None)


def _bytes(told: Mapping[str, Any]) -> bytes:
    return _piece(told["token"]) if told.get("bytes") is None else bytes(told["bytes"])


def _piece(text: str) -> bytes:
    """A token's bytes from its text; OpenAI writes part of a character as `bytes:\\x..`."""
    if text.startswith("bytes:"):
        return bytes(int(byte, 16) for byte in _BYTES.findall(text))
    return text.encode("utf-8")


def _best(pairs: Any) -> tuple[tuple[bytes, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def entropy_bound(best: Sequence[float]) -> float:
    """The least entropy, in nats, of a distribution with these log-probabilities: the rest counts as one outcome.

    NaN where nothing is known.
    """
    if not best:
        return math.nan
    p = [math.exp(logprob) for logprob in best]
    rest = max(0.0, 1.0 - sum(p))
    known = -sum(share * logprob for share, logprob in zip(p, best, strict=True))
    return known - (rest * math.log(rest) if rest else 0.0)


class Vocabulary:
    """Ids of tokens by their bytes; -1 for what has no bytes of its own, and everywhere without a tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        ids = reversed(range(tokenizer.size)) if tokenizer else ()
        self._ids = {tokenizer.piece(i): i for i in ids} if tokenizer else {}
        self._ids.pop(b"", None)

    def id(self, piece: bytes) -> int:
        """The lowest id with these bytes."""
        return self._ids.get(piece, -1)

    def token(self, entry: Entry, text: str, alternatives: int) -> Token:
        """The token of an entry; what the server does not tell is NaN, `entropy` is a lower bound."""
        values = [logprob for _, logprob in entry.best]
        return Token(
            id=self.id(entry.piece),
            text=text,
            logprob=math.nan if entry.logprob is None else entry.logprob,
            entropy=entropy_bound(values),
            margin=values[0] - values[1] if len(values) > 1 else math.nan,
            top=tuple((self.id(piece), logprob) for piece, logprob in entry.best[:alternatives]),
        )


class Answer:
    """An answer as its chunks come in. Where the server counts no tokens, only those that came are counted."""

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self.request, self._vocabulary = request, vocabulary
        self._prompt: tuple[Token, ...] = ()
        self._usage: Usage | None = None
        self._tokens: list[Token] = []
        self._finish: str | None = None
        self._began = time.perf_counter()
        self._first = 0.0

    def echo(self, told: Sequence[Entry], ids: Sequence[int]) -> None:
        """Take note of the prompt's tokens."""
        texts = [entry.piece.decode("utf-8", "replace") for entry in told]
        tokens = (self._vocabulary.token(*pair, self.request.logprobs) for pair in zip(told, texts, strict=True))
        self._prompt = tuple(replace(token, id=i) for token, i in zip(tokens, ids, strict=True))

    def take(self, chunk: Mapping[str, Any]) -> list[Token]:
        """The tokens of one more chunk. Text that comes without log-probabilities is one token without id."""
        if usage := chunk.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or 0
            self._usage = Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
        new: list[Token] = []
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            told = entries(choice.get("logprobs"))
            if text and not told:
                told = [Entry(b"", None, ())]
            for entry, share in zip(told, _shares(text, told), strict=True):
                new.append(self._vocabulary.token(entry, share, self.request.logprobs))
            self._finish = choice.get("finish_reason") or self._finish
        if new and not self._tokens:
            self._first = time.perf_counter() - self._began
        self._tokens += new
        return new

    def reply(self, reason: str | None = None) -> Reply:
        """The end, for `reason` or the server's own; raises `RequestError` if it gave none that is an end."""
        reason = reason or self._finish
        if reason is None:
            raise RequestError("the server broke off in the middle of its answer; see its log, then ask again")
        if reason not in ("stop", "length", "cancelled"):
            raise RequestError(f"the server ended its answer with {reason!r}, which is no whole answer")
        usage = self._usage or Usage(0, len(self._tokens))
        signals = {"seconds": time.perf_counter() - self._began, "first_token_seconds": self._first}
        text = "".join(token.text for token in self._tokens)
        return Reply(text, tuple(self._tokens), reason, usage, signals, prompt=self._prompt)


def _shares(text: str, told: Sequence[Entry]) -> list[str]:
    """How the text of a chunk falls to its tokens: as they read, or all to the last where that is not the same."""
    own = [entry.piece.decode("utf-8", "replace") for entry in told]
    return own if "".join(own) == text or not told else [*[""] * (len(told) - 1), text]
