"""The engine over any OpenAI-compatible server, such as vLLM (SPEC E5).

All requests run in one event loop in a separate thread; at most `workers` are sent at the same time. Messages use the
server's chat completions, raw prompts its completions; both are streamed, and closing the iterator closes the stream,
so that the server frees its slot. Servers give no hidden states (readings have none) and only a few best tokens
(`Token.entropy` is a lower bound from these). Only the server can decide whether a request fits, so `ContextError` and
`BusyError` are raised by the first event.

Replies of a cascade behind cogumi's own server keep its tier, route, decisions, signals and P(correct); the signals
`seconds` and `first_token_seconds` are measured by the client.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar, cast

import numpy as np
import openai
from numpy.typing import NDArray

from cogumi.core.errors import BusyError, ContextError, RequestError
from cogumi.core.types import Reading, Reply, Request, Score, Usage
from cogumi.engine.admission import check_adapter, continuation, prompt_ids, question_start
from cogumi.engine.events import Events, Outcome
from cogumi.engine.few_shot import in_context
from cogumi.engine.llama.binding.model import load_tokenizer
from cogumi.engine.openai_protocol import BEST, Entry, StreamedAnswer, Vocabulary, all_greedy, entries, to_body
from cogumi.engine.protocol import Capabilities, Capability, Event, Tokenizer, lacking
from cogumi.engine.sampling import check

T = TypeVar("T")

LONGEST_REASON = 300
"""Most characters of a server's message quoted in an error."""
KEYS = ("COGUMI_REMOTE_KEY", "OPENAI_API_KEY")
"""Environment variables with the server's key; the first one set is used."""


class RemoteEngine:
    """`engine.protocol.Engine` over the model `model` of the server at `url` (which ends in `/v1`).

    `tokenizer`: a GGUF file with the model's vocabulary, needed for token ids, scores and readings. `adapters`: adapter
    name -> model name on the server. `timeout`: longest wait for the next part of a response, in seconds. `extra`:
    added to the body of every request for text.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: Path | None = None,
        adapters: Mapping[str, str] | None = None,
        key: str | None = None,
        timeout: float = 60.0,
        workers: int = 8,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        self._url, self._model, self._timeout = url, model, timeout
        self._adapters, self._extra = dict(adapters or {}), dict(extra or {})
        self._tokenizer = load_tokenizer(tokenizer) if tokenizer else None
        self._vocabulary = Vocabulary(self._tokenizer)
        known = key or next((value for name in KEYS if (value := os.environ.get(name))), "none")
        self._client = openai.AsyncOpenAI(base_url=url, api_key=known, timeout=timeout)
        self._slots = asyncio.Semaphore(workers)
        self._lock = threading.Lock()
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the given file; raises `RequestError` without a file."""
        if self._tokenizer is None:
            raise RequestError(f"{self._url} does not provide its vocabulary; give a GGUF file of it as tokenizer")
        return self._tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Valid values of a request's `adapter`."""
        return tuple(self._adapters)

    @property
    def context(self) -> None:
        """Only the server knows."""
        return None

    @property
    def capabilities(self) -> Capabilities:
        """Capabilities of OpenAI's API; scores also need a tokenizer, and a server may support less."""
        scores = {Capability.SCORES} if self._tokenizer else set()
        return frozenset({Capability.EMBEDDINGS, Capability.JSON_SCHEMAS} | scores)

    def check(self, request: Request) -> None:
        """Validate a request: raise the errors that `generate` raises before sending it."""
        self._body(request)

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; see `Engine.generate`. Refusals by the server are raised by the first event."""
        body = self._body(request)
        prompt = self._prompt(request) if request.echo else []
        answer, events = StreamedAnswer(request, self._vocabulary), cast(SimpleQueue[Outcome], SimpleQueue())
        task = self._submit(self._answered(body, answer, events, prompt))
        task.add_done_callback(lambda done: events.put(_outcome(done, answer)))
        return Events(events.get, task.cancel)

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` after the request's prompt; see `Engine.score`."""
        prompt = self._prompt(request)
        ids = [*prompt, *continuation(request, answer, self.tokenizer)]
        scored = self._wait(self._echoed(ids, self._named(request), 1))[len(prompt) :]
        nats = -sum(entry.logprob or 0.0 for entry in scored)
        return Score(nats, len(scored), len(answer.encode("utf-8")), greedy=all_greedy(scored))

    def read(self, request: Request) -> Reading:
        """Score of the question; `last` and `mean` are empty, because servers give no hidden states."""
        ids = self._prompt(request)
        first = question_start(request, ids, self.tokenizer)
        echoed = self._wait(self._echoed(ids, self._named(request), 1))
        surprise = tuple(-(entry.logprob or 0.0) for entry in echoed[first:])
        size = sum(len(self.tokenizer.piece(i)) for i in ids[first:])
        return Reading(Score(sum(surprise), len(surprise), size), surprise, (), ())

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The server's embeddings [texts, width]; zeros for an empty text, because servers refuse it."""
        full = [i for i, text in enumerate(texts) if text]
        known = self._wait(self._embedded([texts[i] for i in full] or ["a"]))
        rows = np.zeros((len(texts), known.shape[1]), np.float32)
        rows[full] = known[: len(full)]
        return rows

    def close(self) -> None:
        """Cancel all requests and disconnect."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `work` on the loop; errors of the server become `RequestError`s."""
        with self._lock:
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(self._with_own_errors(work), self._loop)
        work.close()
        raise RequestError("this engine is closed: open it again")

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return self._submit(work).result()
        except CancelledError as error:
            raise RequestError("the engine was closed during the request: open it again") from error

    async def _disconnect(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.close()

    async def _with_own_errors(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` when a slot is free; raises `RequestError` for errors of the server."""
        try:
            async with self._slots:
                return await work
        except openai.APIError as error:
            raise self._error(error) from error
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            what = f"{self._url} sent a response that is not of OpenAI's API ({error!r}); check the address"
            raise RequestError(what) from error
        finally:
            work.close()  # if it was cancelled before a slot was free

    async def _answered(
        self, body: dict[str, Any], answer: StreamedAnswer, events: SimpleQueue[Outcome], prompt: list[int]
    ) -> Reply:
        """Stream one answer into `events`; first echo `prompt` (unless empty) for its log-probabilities."""
        if prompt:
            echoed = await self._echoed(prompt, body["model"], max(BEST, answer.request.logprobs))
            answer.add_prompt(echoed[1:], prompt[1:])
        if answer.request.max_tokens == 0:
            return replace(answer.reply("length"), usage=Usage(len(prompt)))
        create: Any = self._client.chat.completions.create if "messages" in body else self._client.completions.create
        async with await create(**body) as stream:
            async for chunk in stream:
                for event in answer.add(chunk.to_dict()):
                    events.put(event)
        return answer.reply()

    async def _echoed(self, ids: list[int], model: str, best: int) -> list[Entry]:
        """The server's entry for each of `ids`. One token is generated, because not every server accepts zero."""
        completion = await self._client.completions.create(
            model=model, prompt=ids, max_tokens=1, temperature=0, echo=True, logprobs=best, extra_body=self._extra
        )
        echoed = entries(completion.to_dict()["choices"][0].get("logprobs"))
        if len(echoed) != len(ids) + 1 or any(entry.logprob is None for entry in echoed[1:]):
            what = f"it returned {len(echoed)} tokens with log-probabilities, expected {len(ids) + 1}"
            raise RequestError(f"{self._url} does not echo whole prompts ({what}); score with another engine")
        return echoed[:-1]

    async def _embedded(self, texts: list[str]) -> NDArray[np.float32]:
        answer = await self._client.embeddings.create(model=self._model, input=texts)
        rows = np.array([one.embedding for one in sorted(answer.data, key=lambda one: one.index)], np.float32)
        if rows.ndim != 2 or len(rows) != len(texts):
            raise RequestError(f"{self._url} does not return one vector per text; use a server that pools embeddings")
        return rows

    def _body(self, request: Request) -> dict[str, Any]:
        check(request)
        if request.hidden:
            raise lacking(self, Capability.HIDDEN_STATES)
        return to_body(in_context(request), self._named(request)) | {"extra_body": self._extra}

    def _named(self, request: Request) -> str:
        """The model name on the server for a request."""
        check_adapter(request, self._adapters)
        return self._adapters[request.adapter] if request.adapter is not None else self._model

    def _prompt(self, request: Request) -> list[int]:
        return prompt_ids(request, self.tokenizer, self._adapters)

    def _error(self, error: openai.APIError) -> RequestError:
        """Map a failure of the server or of the connection to a `RequestError`."""
        if isinstance(error, openai.APITimeoutError):
            return RequestError(f"{self._url} sent nothing for {self._timeout:g} s; try again, or raise the timeout")
        if isinstance(error, openai.APIConnectionError):
            why = error.__cause__ or error
            return RequestError(f"no connection to {self._url} ({why}); start that server, or correct the address")
        message = error.body.get("message") if isinstance(error.body, dict) else None
        what = f"{self._url} refused: {' '.join(str(message or error.message).split())[:LONGEST_REASON]}"
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        if error.code == "context_length_exceeded" or "maximum context length" in what:
            return ContextError(what)
        if status in (429, 503):
            return BusyError(what)
        if status in (401, 403):
            return RequestError(f"{what}; set the key in {' or '.join(KEYS)}")
        return RequestError(what)


def _outcome(task: Future[Reply], answer: StreamedAnswer) -> Reply | Exception:
    """The reply of a task, or its error."""
    if task.cancelled():
        return answer.reply("cancelled")
    error = task.exception()
    return cast(Exception, error) if error else task.result()
