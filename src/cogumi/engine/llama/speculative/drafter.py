"""A draft model beside the base: it proposes tokens for many sequences at once and keeps its own cache in step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cogumi.engine.generation import Generation
from cogumi.engine.llama.binding.context import Context, Row
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.prefix_reuse import common_prefix
from cogumi.engine.llama.speculative.bridge import Bridge, BridgedText
from cogumi.engine.llama.speculative.speculation import Source
from cogumi.engine.sampling import draw, probabilities


@dataclass(slots=True)
class Draft:
    """Tokens proposed for one generation. `drawn_from` holds the distributions of sampled ones; None: there are none,
    each token was the only one it could be.
    """

    source: Source
    tokens: list[int]
    drawn_from: list[NDArray[np.float64]] | None = None


@dataclass(slots=True)
class _Run:
    """One sequence while it is being drafted for: what remains to be read, and what came out (the draft's ids)."""

    job: Generation
    wanted: int
    unread: list[int]
    end: int  # where the sequence will end: the draft's ids may be more than the base's
    tokens: list[int] = field(default_factory=list)
    drawn_from: list[NDArray[np.float64]] = field(default_factory=list)


@dataclass(slots=True)
class _Translation:
    """One generation in the draft's vocabulary, and how many of its ids have been translated."""

    job: Generation
    text: BridgedText
    settled: int


class Drafter:
    """Proposes tokens of the base's vocabulary, through a `bridge` where the draft has another.

    The cache is brought up to date only when a draft is wanted, so that a draft that stays off costs nothing.
    """

    def __init__(self, context: Context, tokenizer: Tokenizer, bridge: Bridge | None) -> None:
        self._context, self._tokenizer, self._bridge = context, tokenizer, bridge
        self._held: defaultdict[int, list[int]] = defaultdict(list)
        self._bridged: dict[int, _Translation] = {}
        self.steps: list[tuple[int, float]] = []  # of the last proposal: sequences that had one token each, seconds

    def propose(self, wanted: Mapping[int, tuple[Generation, int]]) -> dict[int, Draft]:
        """Drafts of up to so many tokens for the generations in these sequences.

        None yet for one whose text is longer than a batch and still being read.
        """
        runs = {sequence: self._run(sequence, job, k) for sequence, (job, k) in wanted.items()}
        runs = {sequence: run for sequence, run in runs.items() if run.end <= self._context.length}
        self.steps = []
        while rows := self._rows(runs):
            began = time.perf_counter()
            logits = self._context.decode(rows)
            at = 0
            for sequence, tokens, start, outputs in rows:
                self._held[sequence][start:] = tokens
                runs[sequence].unread = runs[sequence].unread[len(tokens) :]
                if outputs:
                    self._take(runs[sequence], logits[at])
                at += outputs
            if all(len(row.tokens) == 1 for row in rows):
                self.steps.append((len(rows), time.perf_counter() - began))
            for run in runs.values():
                if run.unread and not run.tokens and not run.job.request.speculate:
                    run.wanted = 0  # a long text goes on being read next time, so that nobody waits for it
        return {sequence: draft for sequence, run in runs.items() if (draft := self._draft(sequence, run)).tokens}

    def backlog(self, sequence: int, job: Generation) -> int:
        """Tokens that the draft model would have to read before it could propose one."""
        held = self._held[sequence]
        known = len(held) if self._bridge else common_prefix(held, job.ids)
        return max(len(job.ids) - known, 0)

    def close(self) -> None:
        """Free the cache."""
        self._context.close()

    def _run(self, sequence: int, job: Generation, k: int) -> _Run:
        ids, held = self._ids(sequence, job), self._held[sequence]
        keep = min(common_prefix(held, ids), len(ids) - 1)
        if keep < len(held):
            self._context.trim(sequence, keep)
            del held[keep:]
        return _Run(job, k, ids[keep:], len(ids) + k)

    def _ids(self, sequence: int, job: Generation) -> list[int]:
        """The job's whole text in the draft's vocabulary."""
        if self._bridge is None:
            return job.ids
        known = self._bridged.get(sequence)
        if known is None or known.job is not job:
            n = job.prompt_tokens
            known = self._bridged[sequence] = _Translation(job, self._bridge.text(job.request, job.ids[:n]), n)
        for token in job.ids[known.settled :]:
            known.text.append(token)
        known.settled = len(job.ids)
        return known.text.ids

    def _rows(self, runs: Mapping[int, _Run]) -> list[Row]:
        rows: list[Row] = []
        room = self._context.batch
        for sequence, run in runs.items():
            if len(run.tokens) >= run.wanted:
                continue
            tokens = run.unread[:room]
            if tokens:
                rows.append(Row(sequence, tokens, len(self._held[sequence]), int(len(tokens) == len(run.unread))))
                room -= len(tokens)
        return rows

    def _take(self, run: _Run, logits: NDArray[np.float32]) -> None:
        token = int(logits.argmax())
        if run.job.generator is not None and self._bridge is None:
            q = probabilities(logits, run.job.request.temperature, run.job.request.top_p)
            token = draw(q, run.job.generator)
            run.drawn_from.append(q)
        run.tokens.append(token)
        run.unread = [token]
        if self._tokenizer.ends(token):
            run.wanted = 0  # nothing follows an end

    def _draft(self, sequence: int, run: _Run) -> Draft:
        if self._bridge is not None:
            return Draft("model", self._bridged[sequence].text.translate(run.tokens))
        return Draft("model", run.tokens, run.drawn_from or None)
