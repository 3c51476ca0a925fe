"""One adapter's place in the engine: its contexts, the requests in them, and the batches that advance them.

A turn of a lane is one base batch of prompt chunks, last tokens and drafted tokens (SPEC E1, E2), and one of
what is only measured (E7). A lane belongs to the scheduler's thread.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cogumi.runtime.generation import Generation
from cogumi.runtime.llama import Context, Row, Tokenizer
from cogumi.runtime.sampling import draw, logprobs_of, probabilities, signals, top_logprobs
from cogumi.runtime.speculate import Acceptance, verify_greedy, verify_sampled

Logits = NDArray[np.float32]


class Measurement:
    """Log-probabilities of `ids[first:]` given what stands before them, and hidden states if wanted."""

    def __init__(self, ids: list[int], first: int, hidden: bool = False) -> None:
        self.ids, self.first, self.hidden = ids, first, hidden
        self.cached = 0
        self.logprobs: list[float] = []
        self.last = self.total = np.zeros(0, np.float32)
        self.result: Future[Measurement] = Future()

    def take(self, logits: Logits, states: NDArray[np.float32] | None) -> None:
        """Use the outputs of the next `len(logits)` positions."""
        start, self.cached = self.cached, self.cached + len(logits)
        skip = max(self.first - 1 - start, 0)
        targets = np.array(self.ids[start + skip + 1 : self.cached + 1], np.int64)
        if len(targets):
            self.logprobs += logprobs_of(logits[skip : skip + len(targets)], targets).tolist()
        if states is not None:
            self.last = states[-1].copy()
            total = states.sum(axis=0)
            self.total = total if start == 0 else self.total + total

    def fail(self, error: Exception) -> None:
        """Hand the error to whoever waits."""
        self.result.set_exception(error)


@dataclass(slots=True)
class Draft:
    """Tokens proposed for one generation, and the distributions they were drawn from (none if greedy)."""

    tokens: list[int] = field(default_factory=list)
    drawn_from: list[NDArray[np.float64]] = field(default_factory=list)


class Lane:
    """The contexts of one adapter and the jobs in their sequences."""

    def __init__(self, base: Context, draft: Context | None, tokenizer: Tokenizer, acceptance: Acceptance) -> None:
        self.base, self.draft = base, draft
        self._tokenizer, self._acceptance = tokenizer, acceptance
        self._generations: dict[int, Generation] = {}
        self._measurements: dict[int, Measurement] = {}

    def __len__(self) -> int:
        return len(self._generations) + len(self._measurements)

    @property
    def jobs(self) -> list[Generation | Measurement]:
        """Everything in progress."""
        return [*self._generations.values(), *self._measurements.values()]

    def join(self, job: Generation | Measurement) -> None:
        """Give a job the lowest free sequence: neighbours in the cache run in one pass."""
        sequence = 0
        while sequence in self._generations or sequence in self._measurements:
            sequence += 1
        if isinstance(job, Generation):
            self._generations[sequence] = job
        else:
            self._measurements[sequence] = job

    def turn(self) -> None:
        """Run one batch of each kind, as far as there is work."""
        for sequence, job in list(self._generations.items()):
            if job.cancelled:
                self._leave(sequence)
                job.end("cancelled")
        if self._measurements:
            self._measure()
        if self._generations:
            self._generate()

    def close(self) -> None:
        """Free the contexts."""
        self.base.close()
        if self.draft:
            self.draft.close()

    def _leave(self, sequence: int) -> None:
        self._generations.pop(sequence, None)
        self._measurements.pop(sequence, None)
        self.base.trim(sequence, 0)
        if self.draft:
            self.draft.trim(sequence, 0)

    def _measure(self) -> None:
        """Every token is an output, as llama.cpp demands where hidden states are wanted."""
        hidden = any(job.hidden for job in self._measurements.values())
        rows: list[Row] = []
        room = self.base.outputs
        for sequence, job in self._measurements.items():
            run = job.ids[job.cached : job.cached + room]
            if run:
                rows.append(Row(sequence, run, job.cached, len(run)))
                room -= len(run)
        self.base.want_hidden(hidden)
        logits = self.base.decode(rows)
        states = self.base.hidden() if hidden else None
        self.base.want_hidden(False)
        at = 0
        for row in rows:
            job, here = self._measurements[row.sequence], slice(at, at + row.outputs)
            job.take(logits[here], states[here] if states is not None and job.hidden else None)
            at += row.outputs
            if job.cached == len(job.ids):
                self._leave(row.sequence)
                job.result.set_result(job)

    def _generate(self) -> None:
        drafts = self._propose() if self.draft else {}
        rows = self._rows(drafts)
        if self.draft:
            self._teach_draft(self.draft, rows)
        logits = self.base.decode(rows)
        best = logits.argmax(axis=1)
        outputs: list[int] = []  # row of `logits` behind each emitted token
        chosen: list[int] = []
        ends: list[tuple[int, Generation, int, list[int]]] = []  # sequence, job, tokens emitted, drafted
        at = 0
        for sequence, run, start, n in rows:
            job = self._generations[sequence]
            if n:
                draft = drafts.get(sequence) or Draft()
                tokens = self._verify(job, draft, logits[at : at + n], best[at : at + n])
                outputs += range(at, at + len(tokens))
                chosen += tokens
                ends.append((sequence, job, len(tokens), draft.tokens))
                at += n
            else:
                job.cached = start + len(run)
        if chosen:
            self._emit(logits, outputs, chosen, ends)

    def _rows(self, drafts: dict[int, Draft]) -> list[Row]:
        """Last and drafted tokens of those who write, then as much of the prompts as fits the batch."""
        rows: list[Row] = []
        room = self.base.batch
        reading = []
        for sequence, job in self._generations.items():
            if len(job.ids) - job.cached > 1:
                reading.append((sequence, job))
                continue
            run = job.ids[-1:]
            if sequence in drafts:
                run += drafts[sequence].tokens
            rows.append(Row(sequence, run, job.cached, len(run)))
            room -= len(run)
        for sequence, job in reading:
            run = job.ids[job.cached : job.cached + room]
            if run:
                rows.append(Row(sequence, run, job.cached, int(job.cached + len(run) == len(job.ids))))
                room -= len(run)
        return rows

    def _teach_draft(self, draft: Context, rows: list[Row]) -> None:
        """Let the draft read the prompt chunks of those it will draft for."""
        chunks = []
        for sequence, run, start, _ in rows:
            job = self._generations[sequence]
            if job.drafts and job.draft_cached == start and len(job.ids) - start > 1:
                chunks.append(Row(sequence, run, start))
                job.draft_cached += len(run)
        if chunks:
            draft.decode(chunks)

    def _propose(self) -> dict[int, Draft]:
        """Draft for all who write and may still use it: one draft step for all of them together."""
        assert self.draft
        wanted = {
            sequence: min(job.drafts, job.remaining - 1)
            for sequence, job in self._generations.items()
            if job.drafts and len(job.ids) - job.cached == 1
        }
        drafts = {sequence: Draft() for sequence, k in wanted.items() if k > 0}
        for i in range(max(wanted.values(), default=0)):
            rows: list[Row] = []
            for sequence, draft in drafts.items():
                if wanted[sequence] > i:
                    job = self._generations[sequence]
                    run = draft.tokens[-1:] if i else job.ids[job.draft_cached :]
                    rows.append(Row(sequence, run, job.draft_cached, 1))
                    job.draft_cached += len(run)
            if not rows:
                break
            logits = self.draft.decode(rows)
            best = logits.argmax(axis=1).tolist()
            for at, row in enumerate(rows):
                job, draft = self._generations[row.sequence], drafts[row.sequence]
                token = best[at]
                if job.generator is not None:
                    q = probabilities(logits[at], job.request.temperature, job.request.top_p)
                    token = draw(q, job.generator)
                    draft.drawn_from.append(q)
                draft.tokens.append(token)
                if self._tokenizer.ends(token):
                    wanted[row.sequence] = 0  # nothing follows an end
        return drafts

    def _verify(self, job: Generation, draft: Draft, logits: Logits, best: NDArray[np.intp]) -> list[int]:
        """The tokens that one pass of the base settles: at least one."""
        if job.generator is None:
            tokens = verify_greedy(draft.tokens, best.tolist())
        else:
            p = [probabilities(row, job.request.temperature, job.request.top_p) for row in logits]
            tokens = verify_sampled(draft.tokens, draft.drawn_from, p, job.generator)
        if draft.tokens:
            job.drafted += len(draft.tokens)
            job.accepted += len(tokens) - 1
            self._acceptance.update(len(draft.tokens), len(tokens) - 1)
        return tokens

    def _emit(
        self,
        logits: Logits,
        outputs: list[int],
        chosen: list[int],
        ends: list[tuple[int, Generation, int, list[int]]],
    ) -> None:
        """Hand out the settled tokens with their signals, and bring the caches in line with them."""
        rows = logits if len(outputs) == len(logits) else logits[outputs]
        told = signals(rows, np.array(chosen))
        i = 0
        for sequence, job, n, drafted in ends:
            length = len(job.ids)
            for j in range(n):
                token = chosen[i + j]
                is_end = self._tokenizer.ends(token)
                agreed = token == drafted[j] if j < len(drafted) else None
                top = top_logprobs(rows[i + j], job.request.logprobs)
                if job.emit(token, self._tokenizer.piece(token), is_end, told[i + j], agreed, top):
                    self._leave(sequence)
                    break
            else:
                job.cached = length + n - 1
                if n <= len(drafted):
                    self.base.trim(sequence, job.cached)
                if self.draft and job.draft_cached > job.cached:
                    job.draft_cached = job.cached
                    self.draft.trim(sequence, job.cached)
            i += n
