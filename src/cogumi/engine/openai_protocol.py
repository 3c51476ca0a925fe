"""Client side of OpenAI's API: converts requests to bodies, and streamed chunks to tokens (SPEC E5)."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from cogumi.core.errors import RequestError
from cogumi.core.types import Decision, Reply, Request, Token, Usage
from cogumi.engine.protocol import Tokenizer
from cogumi.engine.reply_extension import ReplyExtension, read_extension

BEST = 5
"""Best tokens requested with every token: the most that OpenAI's own completions give."""
_BYTES = re.compile(r"\\x([0-9a-fA-F]{2})")


def to_body(request: Request, model: str) -> dict[str, Any]:
    """Convert a request to the body of chat completions if it has `messages`, else of completions.

    Raises `RequestError` for features that OpenAI's API does not have.
    """
    if request.grammar is not None:
        raise RequestError("OpenAI's API has no grammars; give a JSON schema, or use the llama engine")
    if request.lark is not None or request.tools or any(message.calls for message in request.messages):
        raise RequestError("tools are not passed on to another server yet; ask a model that runs here")
    best = max(BEST, request.logprobs)
    optional = {
        "max_tokens": request.max_tokens,
        "stop": list(request.stop) or None,
        "seed": request.seed,
        "logit_bias": {str(token): bias for token, bias in request.logit_bias.items()} or None,
        "presence_penalty": request.presence_penalty or None,
        "frequency_penalty": request.frequency_penalty or None,
        "top_k": request.top_k or None,  # from here on, keys of vLLM and others, not of OpenAI
        "min_p": request.min_p or None,
        "repetition_penalty": request.repetition_penalty if request.repetition_penalty != 1 else None,
        "min_tokens": request.min_tokens or None,
        "user": request.user,
    }
    body: dict[str, Any] = {
        "model": model,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stream": True,
        "stream_options": {"include_usage": True},
    } | {key: value for key, value in optional.items() if value is not None}
    if request.prompt is not None:
        if not request.prompt:
            raise RequestError("the prompt is empty; give at least one token")
        if request.json_schema is not None:
            raise RequestError("OpenAI's API has JSON schemas in chats only; give messages, not a prompt")
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
    """One token of a server's `logprobs`: bytes, log-probability (None: missing), and the best tokens, best first."""

    piece: bytes
    logprob: float | None
    best: tuple[tuple[bytes, float], ...]


def entries(logprobs: Mapping[str, Any] | None) -> list[Entry]:
    """The tokens of a choice's `logprobs`, in the format of chat (`content`) or of completions (`tokens`)."""
    if not logprobs:
        return []
    if "content" in logprobs:
        return [
            Entry(_bytes(one), one["logprob"], _best((_bytes(top), top["logprob"]) for top in one["top_logprobs"]))
            for one in logprobs["content"] or ()
        ]
    texts = logprobs.get("tokens") or []
    tops = logprobs.get("top_logprobs") or [None] * len(texts)
    rows = zip(texts, logprobs["token_logprobs"], tops, strict=True)
    return [
        Entry(_piece(text), logprob, _best((_piece(one), value) for one, value in (top or {}).items()))
        for text, logprob, top in rows
    ]


def all_greedy(scored: Sequence[Entry]) -> bool | None:
    """Whether each token is the most likely one at its position; None if the server does not return the best tokens."""
    if any(entry.logprob is None or not entry.best for entry in scored):
        return None
    return all(entry.logprob >= entry.best[0][1] for entry in scored if entry.logprob is not None)


def _bytes(entry: Mapping[str, Any]) -> bytes:
    return _piece(entry["token"]) if entry.get("bytes") is None else bytes(entry["bytes"])


def _piece(text: str) -> bytes:
    """A token's bytes from its text; OpenAI writes an incomplete character as `bytes:\\x..`."""
    if text.startswith("bytes:"):
        return bytes(int(byte, 16) for byte in _BYTES.findall(text))
    return text.encode("utf-8")


def _best(pairs: Any) -> tuple[tuple[bytes, float], ...]:
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def entropy_bound(best: Sequence[float]) -> float:
    """A lower bound of the entropy, in nats, of a distribution with these log-probabilities.

    The rest counts as one outcome. NaN without any log-probability.
    """
    if not best:
        return math.nan
    p = [math.exp(logprob) for logprob in best]
    rest = max(0.0, 1.0 - sum(p))
    known = -sum(share * logprob for share, logprob in zip(p, best, strict=True))
    return known - (rest * math.log(rest) if rest else 0.0)


class Vocabulary:
    """Ids of tokens by their bytes; -1 for tokens without bytes, and for all tokens if there is no tokenizer."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        ids = reversed(range(tokenizer.size)) if tokenizer else ()
        self._ids = {tokenizer.piece(i): i for i in ids} if tokenizer else {}
        self._ids.pop(b"", None)

    def id(self, piece: bytes) -> int:
        """The lowest id with these bytes."""
        return self._ids.get(piece, -1)

    def token(self, entry: Entry, text: str, alternatives: int) -> Token:
        """The token of an entry; values that the server does not give are NaN, `entropy` is a lower bound."""
        values = [logprob for _, logprob in entry.best]
        return Token(
            id=self.id(entry.piece),
            text=text,
            logprob=math.nan if entry.logprob is None else entry.logprob,
            entropy=entropy_bound(values),
            margin=values[0] - values[1] if len(values) > 1 else math.nan,
            top=tuple((self.id(piece), logprob) for piece, logprob in entry.best[:alternatives]),
        )


class StreamedAnswer:
    """Collects an answer from the chunks of its stream. Counts tokens if the server gives no usage."""

    def __init__(self, request: Request, vocabulary: Vocabulary) -> None:
        self.request, self._vocabulary = request, vocabulary
        self._prompt: tuple[Token, ...] = ()
        self._usage: Usage | None = None
        self._extension: ReplyExtension | None = None
        self._tokens: list[Token] = []
        self._finish: str | None = None
        self._began = time.perf_counter()
        self._first = 0.0

    def add_prompt(self, echoed: Sequence[Entry], ids: Sequence[int]) -> None:
        """Add the prompt's tokens, as the server echoed them."""
        texts = [entry.piece.decode("utf-8", "replace") for entry in echoed]
        tokens = (self._vocabulary.token(*pair, self.request.logprobs) for pair in zip(echoed, texts, strict=True))
        self._prompt = tuple(replace(token, id=i) for token, i in zip(tokens, ids, strict=True))

    def add(self, chunk: Mapping[str, Any]) -> list[Token | Decision]:
        """Add a chunk and return its events. Text without log-probabilities becomes one token without id."""
        if usage := chunk.get("usage"):
            details = usage.get("prompt_tokens_details") or {}
            cached = details.get("cached_tokens") or 0
            self._usage = Usage(usage["prompt_tokens"], usage["completion_tokens"], cached)
        new: list[Token] = []
        for choice in chunk.get("choices") or ():
            text = (choice.get("delta") or {}).get("content") or choice.get("text") or ""
            listed = entries(choice.get("logprobs"))
            if text and not listed:
                listed = [Entry(b"", None, ())]
            for entry, share in zip(listed, _shares(text, listed), strict=True):
                new.append(self._vocabulary.token(entry, share, self.request.logprobs))
            self._finish = choice.get("finish_reason") or self._finish
        if new and not self._tokens:
            self._first = time.perf_counter() - self._began
        self._tokens += new
        return [*new, *self._decisions(chunk)]

    def _decisions(self, chunk: Mapping[str, Any]) -> tuple[Decision, ...]:
        """Read the `cogumi` object, which cogumi's own server adds to the last chunk of a choice."""
        if "cogumi" not in chunk or (extension := read_extension(chunk["cogumi"])) is None:
            return ()
        self._extension = extension
        return extension.decisions

    def reply(self, reason: str | None = None) -> Reply:
        """The reply, with `reason` or the server's finish reason; raises `RequestError` for an incomplete answer."""
        reason = reason or self._finish
        if reason is None:
            raise RequestError("the server ended the stream before the end of the answer; see its log, then try again")
        if reason not in ("stop", "length", "cancelled"):
            raise RequestError(f"the server ended its answer with {reason!r}, so the answer is not complete")
        extension = self._extension or ReplyExtension()
        timing = {"seconds": time.perf_counter() - self._began, "first_token_seconds": self._first}
        return Reply(
            text="".join(token.text for token in self._tokens),
            tokens=tuple(self._tokens),
            finish_reason=reason,
            usage=extension.usage or self._usage or Usage(0, len(self._tokens)),
            signals=extension.signals | timing,
            decisions=extension.decisions,
            tier=extension.tier,
            route=extension.route,
            p_correct=extension.p_correct,
            accepted=extension.accepted,
            prompt=self._prompt,
        )


def _shares(text: str, listed: Sequence[Entry]) -> list[str]:
    """The text of each token of a chunk: its bytes as text, or all text at the last token if these differ from it."""
    own = [entry.piece.decode("utf-8", "replace") for entry in listed]
    return own if "".join(own) == text or not listed else [*[""] * (len(listed) - 1), text]
