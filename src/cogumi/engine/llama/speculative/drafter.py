"""The draft model: proposes tokens for many sequences in one batch, with its own KV cache."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cogumi.core.text import common_prefix
from cogumi.engine.generation import Generation
from cogumi.engine.llama.binding.context import Context, Row
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.speculative.bridge import Bridge, BridgedText
from cogumi.engine.llama.speculative.speculation import Source
from cogumi.engine.sampling import distribution, draw


@dataclass(slots=True)
class Draft:
    """Tokens proposed for one generation. `distributions` are those the tokens were sampled from; None: the draft was
    deterministic.
    """

    source: Source
    tokens: list[int]
    distributions: list[NDArray[np.float64]] | None = None


@dataclass(slots=True)
class _Run:
    """Drafting state of one sequence: ids still to process, and drafted tokens (in the draft's vocabulary)."""

    job: Generation
    wanted: int
    unread: list[int]
    end: int  # final length of the sequence in the draft's ids, which may exceed the base's
    tokens: list[int] = field(default_factory=list)
    distributions: list[NDArray[np.float64]] = field(default_factory=list)


@dataclass(slots=True)
class _Translation:
    """One generation in the draft's vocabulary, and the number of base ids translated so far."""

    job: Generation
    text: BridgedText
    translated: int


class Drafter:
    """Proposes tokens in the base's vocabulary, through a `bridge` if the draft's vocabulary differs.

    The KV cache is updated only when a draft is requested, so that an unused draft model costs nothing.
    """

    def __init__(self, context: Context, tokenizer: Tokenizer, bridge: Bridge | None) -> None:
        self._context, self._tokenizer, self._bridge = context, tokenizer, bridge
        self._cached: defaultdict[int, list[int]] = defaultdict(list)
        self._bridged: dict[int, _Translation] = {}
        self.steps: list[tuple[int, float]] = []  # one-token steps of the last proposal: (sequences, seconds)

    def propose(self, wanted: Mapping[int, tuple[Generation, int]]) -> dict[int, Draft]:
        """Drafts for the generations in these sequences, each of up to the given number of tokens.

        A generation whose unread text exceeds one batch gets no draft until the text is processed.
        """
        runs = {sequence: self._run(sequence, job, k) for sequence, (job, k) in wanted.items()}
        runs = {sequence: run for sequence, run in runs.items() if run.end <= self._context.length}
        self.steps = []
        while rows := self._rows(runs):
            began = time.perf_counter()
            logits = self._context.decode(rows)
            at = 0
            for sequence, tokens, start, outputs in rows:
                self._cached[sequence][start:] = tokens
                runs[sequence].unread = runs[sequence].unread[len(tokens) :]
                if outputs:
                    self._take(runs[sequence], logits[at])
                at += outputs
            if all(len(row.tokens) == 1 for row in rows):
                self.steps.append((len(rows), time.perf_counter() - began))
            for run in runs.values():
                if run.unread and not run.tokens and not run.job.request.speculate:
                    run.wanted = 0  # the rest of a long text is processed in later calls, so that others need not wait
        return {sequence: draft for sequence, run in runs.items() if (draft := self._draft(sequence, run)).tokens}

    def backlog(self, sequence: int, job: Generation) -> int:
        """Number of tokens that the draft model must process before it can propose one."""
        cached = self._cached[sequence]
        known = len(cached) if self._bridge else common_prefix(cached, job.ids)
        return max(len(job.ids) - known, 0)

    def close(self) -> None:
        """Free the cache."""
        self._context.close()

    def _run(self, sequence: int, job: Generation, k: int) -> _Run:
        ids, cached = self._ids(sequence, job), self._cached[sequence]
        keep = min(common_prefix(cached, ids), len(ids) - 1)
        if keep < len(cached):
            self._context.trim(sequence, keep)
            del cached[keep:]
        return _Run(job, k, ids[keep:], len(ids) + k)

    def _ids(self, sequence: int, job: Generation) -> list[int]:
        """All ids of the job in the draft's vocabulary."""
        if self._bridge is None:
            return job.ids
        known = self._bridged.get(sequence)
        if known is None or known.job is not job:
            n = job.prompt_tokens
            known = self._bridged[sequence] = _Translation(job, self._bridge.text(job.request, job.ids[:n]), n)
        for token in job.ids[known.translated :]:
            known.text.append(token)
        known.translated = len(job.ids)
        return known.text.ids

    def _rows(self, runs: Mapping[int, _Run]) -> list[Row]:
        rows: list[Row] = []
        room = self._context.batch
        for sequence, run in runs.items():
            if len(run.tokens) >= run.wanted:
                continue
            tokens = run.unread[:room]
            if tokens:
                rows.append(Row(sequence, tokens, len(self._cached[sequence]), int(len(tokens) == len(run.unread))))
                room -= len(tokens)
        return sorted(rows)

    def _take(self, run: _Run, logits: NDArray[np.float32]) -> None:
        token = int(logits.argmax())
        if run.job.generator is not None and self._bridge is None:
            q = distribution(logits, run.job.request)
            token = draw(q, run.job.generator)
            run.distributions.append(q)
        run.tokens.append(token)
        run.unread = [token]
        if token in self._tokenizer.ends:
            run.wanted = 0  # no token follows the end token

    def _draft(self, sequence: int, run: _Run) -> Draft:
        if self._bridge is not None:
            return Draft("model", self._bridged[sequence].text.translate(run.tokens))
        return Draft("model", run.tokens, run.distributions or None)
