"""State of one running generation: its text, its tokens, and the queue of events for its reader.

Shared by all engines that run models locally; independent of how logits are computed.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Sequence
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from cogumi.core.types import Reply, Request, Token, Usage
from cogumi.engine.events import Outcome
from cogumi.engine.sampling import LogitsProcessor, Signals, signals, top_logprobs


class TextStream:
    """Turns token bytes into text that can be streamed.

    Incomplete characters and possible beginnings of a stop string are held back; text from a stop string on is never
    released, nor is a character that the last token leaves incomplete.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, piece: bytes, last: bool = False) -> str:
        """Add a token's bytes; returns the released text. With `last` all complete characters are released."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(piece)
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if last else self._possible(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _possible(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a prefix of a stop string."""
        longest = max(map(len, self._stop), default=1) - 1
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0


class Generation:
    """A request being answered. One thread advances it; any thread may read its events or cancel it.

    `cached` counts the ids in the KV cache; `reused` those of them that were cached before the request.
    """

    def __init__(self, request: Request, prompt: list[int], processor: LogitsProcessor | None = None) -> None:
        assert request.max_tokens is not None  # set by `admission.admit`
        self.request, self._most = request, request.max_tokens
        self.processor = processor
        self.ids = list(prompt)  # the prompt, then what has been generated
        self.cached = self.reused = 0
        self.drafted = self.accepted = 0
        self.cancelled = False
        self.ended = False
        self.events: SimpleQueue[Outcome] = SimpleQueue()
        self.generator = np.random.default_rng(request.seed) if request.temperature > 0 else None
        self.prompt_tokens = len(prompt)
        self._echo: list[Token] = []
        self._prompt_text = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._tokens: list[Token] = []
        self._text = TextStream(request.stop)
        self._reason = ""
        self._began = time.perf_counter()
        self._first = 0.0

    @property
    def remaining(self) -> int:
        """Tokens that may still be generated."""
        return self._most - len(self._tokens)

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self._tokens)

    @property
    def echoing(self) -> bool:
        """Whether log-probabilities of prompt tokens are requested and not complete yet."""
        return self.request.echo and self.cached < self.prompt_tokens

    def echo(self, pieces: Sequence[bytes], logits: NDArray[np.float32]) -> None:
        """Record the log-probabilities of the prompt tokens that follow position `cached`.

        `pieces` are those tokens' bytes, `logits` (n, V) those of n positions; a row after the prompt's last token is
        ignored.
        """
        first = self.cached + 1
        targets = self.ids[first : min(first + len(logits), self.prompt_tokens)]
        rows = logits[: len(targets)]
        found = signals(rows, np.array(targets, np.int64)) if targets else []
        for row, token, piece, token_signals in zip(rows, targets, pieces, found, strict=False):
            text = self._prompt_text.decode(piece)
            self._echo.append(Token(token, text, *token_signals, None, top_logprobs(row, self.request.logprobs)))

    def emit(
        self,
        token: int,
        piece: bytes,
        is_end: bool,
        token_signals: Signals,
        draft_agreed: bool | None = None,
        top: tuple[tuple[int, float], ...] = (),
    ) -> bool:
        """Add one token with its signals; returns whether the answer has ended."""
        if not self._tokens:
            self._first = time.perf_counter() - self._began
        last = is_end or self.remaining == 1
        text = self._text.push(b"" if is_end else piece, last)
        event = Token(token, text, *token_signals, draft_agreed, top)
        self.ids.append(token)
        self._tokens.append(event)
        self.events.put(event)
        if last or self._text.stopped:
            self.end("stop" if is_end or self._text.stopped else "length")
        return self.ended

    def end(self, reason: str) -> None:
        """End the answer and emit its `Reply`; if its hidden state is requested, `finish` must follow."""
        self.ended = True
        self._reason = reason
        if not self.request.hidden or reason == "cancelled":
            self.finish(())

    def finish(self, hidden: tuple[float, ...]) -> None:
        """Emit the `Reply`."""
        figures = {"seconds": time.perf_counter() - self._began, "first_token_seconds": self._first}
        if self.drafted:
            figures["acceptance"] = self.accepted / self.drafted
        usage = Usage(self.prompt_tokens, len(self._tokens), self.reused, self.drafted, self.accepted)
        text = "".join(token.text for token in self._tokens)
        tokens, echo = tuple(self._tokens), tuple(self._echo)
        self.events.put(Reply(text, tokens, self._reason, usage, figures, prompt=echo, hidden=hidden))

    def cancel(self) -> None:
        """Request the end of the generation; the engine ends it before its next step."""
        self.cancelled = True

    def fail(self, error: Exception) -> None:
        """End with an error, which is raised in the reader of the events."""
        self.ended = True
        self.events.put(error)
