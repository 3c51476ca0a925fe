"""The llama.cpp context of one adapter: the jobs in its sequences, and the batches that advance them.

One step runs a batch of prompt chunks, last tokens and drafted tokens (SPEC E1, E2), a batch of measurements (SPEC E7),
and a batch of answers by adapted heads (SPEC C9), which need the hidden state of every token. An idle sequence keeps
its KV cache for the next prompt with the same prefix. Used only on the scheduler's thread.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.engine.generation import Generation
from cogumi.engine.llama.binding.context import Context, Row, adjacent
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.jobs import Adaptation, Measurement, Prefill, SupportExample
from cogumi.engine.llama.prefix_reuse import CachedSequence, choose_sequence
from cogumi.engine.llama.speculative.drafter import Draft
from cogumi.engine.llama.speculative.drafting import Speculator
from cogumi.engine.llama.speculative.speculation import verify_greedy, verify_sampled
from cogumi.engine.sampling import LogitsProcessor, distribution, signals, top_logprobs

Logits = NDArray[np.float32]
Job: TypeAlias = Generation | Measurement | Prefill

MAX_STALL, MIN_PREFILL = 0.25, 16
"""Seconds by which prefill may delay running generations, and the prompt tokens that are processed in any case."""


class _Accepted(NamedTuple):
    """The tokens accepted for a generation in one step, and the row of logits of the first of them."""

    sequence: int
    job: Generation
    tokens: list[int]
    draft: Draft | None
    at: int


class AdapterContext:
    """The context of one adapter and the jobs in its sequences."""

    def __init__(self, base: Context, tokenizer: Tokenizer, speculator: Speculator | None) -> None:
        self._base, self._tokenizer, self._speculator = base, tokenizer, speculator
        self._jobs: dict[int, Job] = {}
        self._cached = {sequence: CachedSequence() for sequence in range(base.sequences)}
        self._first_logits: dict[int, Logits] = {}  # of generations whose whole prompt has been processed already
        self._clock = 0
        self._prefill_seconds = 0.0  # last measured time of one prompt token; 0 before the first

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> list[Job]:
        """The jobs in progress."""
        return list(self._jobs.values())

    def admit(self, job: Job) -> None:
        """Assign a job to the free sequence with the best reusable cache."""
        free, most = {s: cached for s, cached in self._cached.items() if s not in self._jobs}, _reusable(job)
        sequence, common = choose_sequence(job.ids if most else (), free)
        cached = self._cached[sequence]
        job.cached = min(common, most)
        if isinstance(job, Generation) and most and cached.logits is not None and cached.ids == job.ids:
            self._first_logits[sequence], job.cached = cached.logits, common
        if job.cached < len(cached.ids):
            self._base.trim(sequence, job.cached)
        if isinstance(job, Generation):
            job.reused = job.cached
        self._cached[sequence] = CachedSequence()
        self._jobs[sequence] = job

    def remove_cancelled(self) -> None:
        """Free the sequences of cancelled jobs."""
        for sequence, job in list(self._jobs.items()):
            if job.cancelled:
                self._release(sequence)
                job.end("cancelled")

    def step(self) -> None:
        """Run one batch of each kind that has work. An error fails all jobs of this context."""
        try:
            self._measure()
            self._adapt()
            self._generate()
        except Exception as error:  # passed to all jobs
            self._reset(error)

    def close(self) -> None:
        """Free the contexts."""
        self._base.close()
        if self._speculator:
            self._speculator.close()

    def _release(self, sequence: int, logits: Logits | None = None) -> None:
        """Remove a job from its sequence and keep its KV cache for reuse, with the logits after it if known."""
        job = self._jobs.pop(sequence)
        self._first_logits.pop(sequence, None)
        self._clock += 1
        self._base.trim(sequence, job.cached)
        self._cached[sequence] = CachedSequence(job.ids[: job.cached], self._clock, logits)

    def _reset(self, error: Exception) -> None:
        """After an error the context's state is undefined: fail all jobs and clear the cache."""
        jobs, self._jobs = self.jobs, {}
        self._base.clear()
        self._first_logits.clear()
        self._cached = {sequence: CachedSequence() for sequence in self._cached}
        for job in jobs:
            job.fail(error)

    def _measure(self) -> None:
        """Run a batch of measurements. Every token is an output, as llama.cpp requires for hidden states.

        A text is always cut at the same positions, whatever else is in the batch, so that sums over its states are
        bit-identical.
        """
        jobs = {sequence: found for sequence, job in self._jobs.items() if (found := _measured(job))}
        if not jobs:
            return
        hidden = any(job.hidden for job in jobs.values())
        rows: list[Row] = []
        room = self._base.outputs
        for sequence, job in jobs.items():
            run = job.ids[job.cached : job.cached + self._base.outputs]
            if len(run) <= room:
                rows.append(Row(sequence, run, job.cached, len(run)))
                room -= len(run)
        rows.sort()
        logits = self._base.decode(rows, hidden=hidden)
        states = self._base.hidden() if hidden else None
        at = 0
        for row in rows:
            job, here = jobs[row.sequence], slice(at, at + row.outputs)
            job.take(logits[here], states[here] if states is not None and job.hidden else None)
            at += row.outputs
            if job.cached < len(job.ids):
                continue
            if isinstance(job, Measurement):
                self._release(row.sequence, logits[at - 1 : at].copy())
                job.end()
            else:
                self._base.trim(row.sequence, 0)

    def _adapt(self) -> None:
        """One gradient step for every head whose examples have been processed."""
        for job in self._jobs.values():
            if isinstance(job, Adaptation) and not job.ready and job.unread is None:
                job.step()

    def _generate(self) -> None:
        if self._first_logits:
            known, self._first_logits = self._first_logits, {}
            whole = [Row(sequence, (), self._jobs[sequence].cached, 1) for sequence in known]
            self._process(whole, {}, np.concatenate(list(known.values())), None)
        decoding: dict[int, Generation] = {}
        adapted: dict[int, Adaptation] = {}
        prefilling: dict[int, Generation | Prefill] = {}
        for sequence, job in self._jobs.items():
            last = len(job.ids) - job.cached == 1
            if isinstance(job, Measurement) or (isinstance(job, Adaptation) and not job.ready):
                continue
            if isinstance(job, Adaptation) and last:
                adapted[sequence] = job
            elif isinstance(job, Generation) and last and not job.echoing:
                decoding[sequence] = job
            else:
                prefilling[sequence] = job
        if decoding or prefilling:
            self._advance(decoding, prefilling)
        if adapted:
            self._advance_adapted(adapted)

    def _advance_adapted(self, adapted: dict[int, Adaptation]) -> None:
        """Decode one token for adapted heads. Each head changes only its own row of logits, never another row."""
        rows = sorted(_decode_row(sequence, job, None) for sequence, job in adapted.items())
        logits, states = self._base.decode(rows, hidden=True), self._base.hidden()
        own = [adapted[row.sequence].low_rank.apply(logits[i], states[i]) for i, row in enumerate(rows)]
        self._process(rows, {}, np.stack(own), states)

    def _advance(self, decoding: dict[int, Generation], prefilling: dict[int, Generation | Prefill]) -> None:
        drafts: dict[int, Draft] = {}
        if self._speculator and decoding:
            drafts = self._speculator.propose(decoding, self._base.outputs, self._base.sequences)
        rows = [_decode_row(sequence, job, drafts.get(sequence)) for sequence, job in decoding.items()]
        rows += self._prefill_rows(prefilling, len(rows), sum(len(row.tokens) for row in rows))
        rows.sort()
        # A token's hidden state costs nothing here, unless prompt tokens or idle sequences would become outputs too.
        hidden = not prefilling and adjacent(rows) and any(job.request.hidden for job in decoding.values())
        began = time.perf_counter()
        logits = self._base.decode(rows, hidden=hidden)
        self._record_time(rows, len(decoding), time.perf_counter() - began)
        self._process(rows, drafts, logits, self._base.hidden() if hidden else None)

    def _record_time(self, rows: list[Row], decoding: int, seconds: float) -> None:
        """Update the latency estimates from the time of a batch with `decoding` rows of running generations."""
        sizes = [len(row.tokens) for row in rows]
        if len(rows) > decoding:
            if sum(sizes) >= MIN_PREFILL:
                self._prefill_seconds = seconds / sum(sizes)
        elif self._speculator and len(set(sizes)) == 1:  # one pass of llama.cpp
            self._speculator.observe(sum(sizes), seconds)

    def _prefill_rows(self, prefilling: dict[int, Generation | Prefill], decoding: int, used: int) -> list[Row]:
        """Prompt chunks that fit into the batch beside `used` decoded tokens and into the allowed stall time.

        `Prefill` jobs come last.
        """
        rows: list[Row] = []
        room = self._base.batch - used
        stall = MAX_STALL * max(len(prefilling) / max(decoding, 1), 1.0)  # waiting prompts count as well
        if used and self._prefill_seconds * room > stall:
            room = max(int(stall / self._prefill_seconds), MIN_PREFILL)
        outputs = self._base.outputs - used
        for sequence, job in sorted(prefilling.items(), key=lambda item: isinstance(item[1], Prefill)):
            echoes = isinstance(job, Generation) and job.request.echo
            end = len(job.ids) - isinstance(job, Adaptation)  # the last token of an adapted head needs its hidden state
            run = job.ids[job.cached : min(job.cached + (min(room, outputs) if echoes else room), end)]
            if not run or outputs == 0:
                break
            ends = job.cached + len(run) == len(job.ids) and isinstance(job, Generation)
            rows.append(Row(sequence, run, job.cached, len(run) if echoes else int(ends)))
            room, outputs = room - len(run), outputs - rows[-1].outputs
        return rows

    def _process(self, rows: list[Row], drafts: dict[int, Draft], logits: Logits, states: Logits | None) -> None:
        """Verify drafted tokens, choose the next tokens, and update jobs and KV cache.

        `states` (outputs, width) are the hidden states of the rows of `logits`, if known.
        """
        best = logits.argmax(axis=1)
        accepted: list[_Accepted] = []
        at = 0
        for sequence, run, start, n in rows:
            job, draft, here = self._jobs[sequence], drafts.get(sequence), slice(at, at + n)
            at += n
            if isinstance(job, Generation) and job.echoing:
                targets = job.ids[start + 1 : start + 1 + n]
                job.echo([self._tokenizer.piece(token) for token in targets], logits[here])
                here = slice(at - 1, at)
            read = start + len(run) - (len(draft.tokens) if draft else 0)
            if isinstance(job, Generation) and job.remaining and read == len(job.ids):
                if tokens := self._accept(sequence, job, draft, logits[here], best[here]):
                    accepted.append(_Accepted(sequence, job, tokens, draft, here.start))
                continue
            job.cached = start + len(run)
            if job.cached == len(job.ids):  # a `Prefill`, or a request for no new tokens
                self._release(sequence)
                job.end("length")
        if accepted:
            self._emit(logits, states, accepted)

    def _accept(
        self, sequence: int, job: Generation, draft: Draft | None, logits: Logits, best: NDArray[np.intp]
    ) -> list[int]:
        """The tokens accepted for a generation by one pass of the base; empty after an error, which ends the job."""
        try:
            tokens = _verify(job, draft, logits, best)
        except RequestError as error:
            self._release(sequence)
            job.fail(error)
            return []
        if draft:
            job.drafted += len(draft.tokens)
            job.accepted += len(tokens) - 1
        if self._speculator:
            self._speculator.learn(sequence, draft, tokens)
        return tokens

    def _read_hidden(self, sequence: int, job: Generation) -> None:
        """Process the token before an answer's last one again, to get its hidden state.

        For answers whose last pass could not return it; see `_advance`.
        """
        again = Measurement(job.ids[:-1], len(job.ids) - 1, hidden=True)
        again.cached = len(again.ids) - 1
        self._base.trim(sequence, again.cached)
        self._jobs[sequence] = again

        def finish(done: Future[Measurement]) -> None:
            error = done.exception()
            if error is None:
                job.finish(tuple(done.result().last.tolist()))
            elif isinstance(error, RequestError):  # the engine was closed
                job.end("cancelled")
            elif isinstance(error, Exception):
                job.fail(error)

        again.result.add_done_callback(finish)

    def _emit(self, logits: Logits, states: Logits | None, accepted: list[_Accepted]) -> None:
        """Emit the accepted tokens with their signals."""
        outputs = [at for item in accepted for at in range(item.at, item.at + len(item.tokens))]
        chosen = [token for item in accepted for token in item.tokens]
        rows = logits if len(outputs) == len(logits) else logits[outputs]
        found = signals(rows, np.array(chosen))
        i = 0
        for sequence, job, tokens, draft, at in accepted:
            drafted = draft.tokens if draft else []
            for j, token in enumerate(tokens):
                is_end = token in self._tokenizer.ends
                agreed = token == drafted[j] if j < len(drafted) else None
                top = top_logprobs(rows[i + j], job.request.logprobs)
                if job.emit(token, self._tokenizer.piece(token), is_end, found[i + j], agreed, top):
                    break
            job.cached = len(job.ids) - 1
            if job.ended and job.request.hidden and states is None:
                self._read_hidden(sequence, job)
            elif job.ended:
                self._release(sequence)
                if job.request.hidden and states is not None:
                    job.finish(tuple(states[at + j].tolist()))
            elif len(tokens) <= len(drafted):
                self._base.trim(sequence, job.cached)
            i += len(tokens)


def _measured(job: Job) -> Measurement | SupportExample | None:
    """The ids of a job that need a measurement pass now, if any."""
    if isinstance(job, Adaptation):
        return job.unread
    return job if isinstance(job, Measurement) else None


def _reusable(job: Job) -> int:
    """Number of leading tokens that may come from the cache: those whose outputs are not needed."""
    if isinstance(job, Adaptation):
        return 0
    if isinstance(job, Measurement):
        return job.reusable
    echoes = isinstance(job, Generation) and job.request.echo
    return 0 if echoes else len(job.ids) - 1


def _decode_row(sequence: int, job: Generation, draft: Draft | None) -> Row:
    """The row of a decoding job: its last token, followed by the drafted ones."""
    run = [job.ids[-1], *(draft.tokens if draft else ())]
    return Row(sequence, run, job.cached, len(run))


def _verify(job: Generation, draft: Draft | None, logits: Logits, best: NDArray[np.intp]) -> list[int]:
    """The tokens accepted by one pass; `logits` and `best` have a row for each token of the run."""
    drafted, processor, request = draft.tokens if draft else [], job.processor, job.request

    def advanced(i: int) -> LogitsProcessor | None:
        if processor and i:
            processor.accept(drafted[i - 1])  # row i is evaluated only if the drafted token before it was accepted
        return processor

    if job.generator is None:

        def greedy(i: int) -> int:
            now = advanced(i)
            return now.best(logits[i]) if now else int(best[i])

        tokens = verify_greedy(drafted, greedy)
    else:

        def sampled_from(i: int) -> NDArray[np.float64]:
            now = advanced(i)
            return distribution(now.apply(logits[i]) if now else logits[i], request)

        tokens = verify_sampled(drafted, draft.distributions if draft else None, sampled_from, job.generator)
    if processor:
        processor.accept(tokens[-1])
    return tokens
