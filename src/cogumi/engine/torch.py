"""The engine for builds: transformers in fp32, for thousands of short answers (SPEC E4).

`generate` only queues. The first reader runs all queued requests of the same adapter, sorted by prompt length, in
left-padded batches with one forward pass per token; finished rows leave the batch. An echoed prompt needs a separate
pass. Tokens may skip layers (`models.depth_routers`) (SPEC C7).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel

from cogumi.core.errors import BundleError
from cogumi.core.types import Reading, Request, Score
from cogumi.engine.admission import admit, check_length, continuation, prompt_ids, question_start
from cogumi.engine.events import Events, Outcome
from cogumi.engine.generation import Generation
from cogumi.engine.protocol import Capabilities, Capability, Event, lacking
from cogumi.engine.sampling import LogitsProcessor, distribution, draw, logprobs_of, signals, top_logprobs
from cogumi.models.depth_routers import Depth, Spans, install, new_cache
from cogumi.models.folders import load
from cogumi.models.tokenization import HFTokenizer

CAPABILITIES = frozenset(
    {Capability.SCORES, Capability.HIDDEN_STATES, Capability.WHOLE_DISTRIBUTIONS, Capability.EMBEDDINGS}
)
ROWS = 256
"""Answers per batch; larger batches use more memory without being faster."""


class TorchEngine:
    """`engine.protocol.Engine` over a Hugging Face folder and PEFT adapter folders; no speculative decoding.

    `context` defaults to the model's maximum. Raises `BundleError` if a folder cannot be used. `depth` lets tokens skip
    layers; a skipped layer leaves the hidden state unchanged: no attention, no feed-forward, no keys and values for
    later tokens. `spans` are the groups of layers that `depth` decides on (None: each layer separately).
    """

    def __init__(
        self,
        folder: Path,
        *,
        adapters: Mapping[str, Path] | None = None,
        context: int | None = None,
        depth: Depth | None = None,
        spans: Spans | None = None,
    ) -> None:
        self._tokenizer = HFTokenizer.load(folder)
        self._pieces = [self._tokenizer.piece(i) for i in range(self._tokenizer.size)]
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model: Any = _load(folder, adapters or {}).to(self._device)
        self._names = tuple(adapters or {})
        self._context = context or int(self._model.config.max_position_embeddings)
        self._decoder: Any = self._model.get_decoder()
        if depth:
            install(self._decoder, depth, spans)
        self._waiting: list[Generation] = []
        self._lock = threading.Lock()

    @property
    def tokenizer(self) -> HFTokenizer:
        """The folder's tokenizer."""
        return self._tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names a request may give as `adapter`."""
        return self._names

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._context

    @property
    def capabilities(self) -> Capabilities:
        """See `CAPABILITIES`."""
        return CAPABILITIES

    def check(self, request: Request) -> None:
        """Validate a request; raises the same errors as `generate`, before any work."""
        self._admit(request)

    def generate(self, request: Request) -> Iterator[Event]:
        """Answer a request; see `Engine.generate`."""
        generation = self._admit(request)
        with self._lock:
            self._waiting.append(generation)
        return Events(lambda: self._receive(generation), generation.cancel)

    def score(self, request: Request, answer: str) -> Score:
        """Negative log-likelihood of `answer` after the request's prompt; see `Engine.score`."""
        prompt = self._prompt(request)
        targets = np.array(continuation(request, answer, self._tokenizer), np.int64)
        logits, _ = self._forward([*prompt, *targets.tolist()], request.adapter)
        rows = logits[len(prompt) - 1 : -1]
        nats = -logprobs_of(rows, targets).sum(dtype=np.float64)
        greedy = bool((rows.argmax(axis=1) == targets).all())
        return Score(float(nats), len(targets), len(answer.encode("utf-8")), greedy)

    def read(self, request: Request) -> Reading:
        """Score and hidden states of the question; see `Engine.read`."""
        ids = self._prompt(request)
        first = question_start(request, ids, self._tokenizer)
        logits, hidden = self._forward(ids, request.adapter)
        logits, hidden = logits[first - 1 :], hidden[first - 1 :]
        surprise = tuple((-logprobs_of(logits[:-1], np.array(ids[first:], np.int64))).tolist())
        size = sum(len(self._pieces[i]) for i in ids[first:])
        score = Score(sum(surprise), len(surprise), size)
        return Reading(score, surprise, tuple(hidden[-1].tolist()), tuple(hidden.mean(axis=0).tolist()))

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean hidden states (texts, width) of the base; an empty text is a row of zeros."""
        rows = np.zeros((len(texts), self._model.config.hidden_size), np.float32)
        for row, text in zip(rows, texts, strict=True):
            if text:
                row[:] = self._forward(self._tokenizer.encode(text), None)[1].mean(axis=0)
        return rows

    def close(self) -> None:
        """End waiting requests as cancelled."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for generation in waiting:
            generation.end("cancelled")

    def _admit(self, request: Request) -> Generation:
        request, prompt = admit(request, self._tokenizer, self._names, self._context)
        return Generation(request, prompt, self._processor(request, prompt))

    def _prompt(self, request: Request) -> list[int]:
        return prompt_ids(request, self._tokenizer, self._names)

    def _processor(self, request: Request, prompt: list[int]) -> LogitsProcessor | None:
        if request.grammar is not None:
            raise lacking(self, Capability.GRAMMARS)
        if request.json_schema is not None or request.lark is not None:
            raise lacking(self, Capability.JSON_SCHEMAS)
        return LogitsProcessor.of(request, prompt, self._tokenizer.ends)

    def _select(self, adapter: str | None) -> None:
        if adapter:
            self._model.base_model.enable_adapter_layers()
            self._model.set_adapter(adapter)
        elif self._names:
            self._model.base_model.disable_adapter_layers()

    def _forward(self, ids: list[int], adapter: str | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Logits (n, V) and hidden states after the final norm (n, width) at every position."""
        check_length(len(ids), self._context)
        with self._lock:
            self._select(adapter)
            return self._pass(ids)

    @torch.inference_mode()
    def _pass(self, ids: list[int]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        hidden = self._decoder(torch.tensor([ids], device=self._device), use_cache=False).last_hidden_state
        logits = self._model.get_output_embeddings()(hidden)
        return logits[0].cpu().numpy(), hidden[0].cpu().numpy()

    def _receive(self, generation: Generation) -> Outcome:
        with self._lock:
            if not generation.ended:
                self._answer(generation.request.adapter)
        return generation.events.get()

    def _answer(self, adapter: str | None) -> None:
        """Complete all queued requests of an adapter."""
        mine = [g for g in self._waiting if g.request.adapter == adapter]
        self._waiting = [g for g in self._waiting if g.request.adapter != adapter]
        self._select(adapter)
        for generation in mine:
            if generation.cancelled:
                generation.end("cancelled")
        mine = sorted((g for g in mine if not g.ended), key=lambda g: len(g.ids))
        for generation in mine:
            if generation.request.echo:
                generation.echo([self._pieces[i] for i in generation.ids[1:]], self._pass(generation.ids)[0])
            if not generation.remaining:
                generation.end("length")
        mine = [g for g in mine if not g.ended]
        for start in range(0, len(mine), ROWS):
            self._run(mine[start : start + ROWS])
        for generation in mine:
            if generation.request.hidden:
                generation.finish(tuple(self._pass(generation.ids[:-1])[1][-1].tolist()))

    @torch.inference_mode()
    def _run(self, batch: list[Generation]) -> None:
        width = max(len(g.ids) for g in batch)
        ids = torch.tensor([[0] * (width - len(g.ids)) + g.ids for g in batch], device=self._device)
        mask = torch.tensor([[0] * (width - len(g.ids)) + [1] * len(g.ids) for g in batch], device=self._device)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache = new_cache(self._decoder)
        while batch:
            out = self._model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1)
            tokens = self._emit(batch, out.logits[:, -1].cpu().numpy())
            alive = [i for i, generation in enumerate(batch) if not generation.ended]
            if len(alive) < len(batch):
                batch = [batch[i] for i in alive]
                keep = torch.tensor(alive, dtype=torch.long, device=self._device)
                cache.batch_select_indices(keep)
                mask, positions, tokens = mask[keep], positions[keep], tokens[alive]
            ids = torch.from_numpy(tokens).to(self._device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = positions[:, -1:] + 1

    def _emit(self, batch: list[Generation], logits: NDArray[np.float32]) -> NDArray[np.int64]:
        """Choose and emit the next token of every row."""
        tokens: NDArray[np.int64] = logits.argmax(axis=1)
        for i, generation in enumerate(batch):
            request, processor = generation.request, generation.processor
            row = processor.apply(logits[i]) if processor else logits[i]
            if generation.generator is not None:
                tokens[i] = draw(distribution(row, request), generation.generator)
            elif processor:
                tokens[i] = row.argmax()
            if processor:
                processor.accept(int(tokens[i]))
        found = signals(logits, tokens)
        for i, (generation, token) in enumerate(zip(batch, tokens.tolist(), strict=True)):
            top = top_logprobs(logits[i], generation.request.logprobs)
            generation.emit(token, self._pieces[token], token in self._tokenizer.ends, found[i], None, top)
        return tokens


def _load(folder: Path, adapters: Mapping[str, Path]) -> Any:
    model = load(folder)
    try:
        for name, path in adapters.items():
            if isinstance(model, PeftModel):
                model.load_adapter(path, adapter_name=name)
            else:
                model = PeftModel.from_pretrained(model, path, adapter_name=name)
    except (OSError, ValueError, RuntimeError) as error:
        raise BundleError(f"an adapter of {folder} cannot be loaded: {error}") from error
    return model.eval()
