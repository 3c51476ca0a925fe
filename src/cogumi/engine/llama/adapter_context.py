"""One adapter's place in the engine: its context, the jobs in its sequences, and the batches that advance them.

A turn of a lane is one batch of prompt chunks, last tokens and drafted tokens (SPEC E1, E2), one of what is only
measured (E7), and one for answers by adapted heads (C9), which need the hidden state behind every token. A sequence
that no job uses keeps what it has read, for the next prompt that begins alike. A lane belongs to the scheduler's
thread.
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cogumi.core.errors import RequestError
from cogumi.engine.generation import Generation
from cogumi.engine.llama.binding.context import Context, Row
from cogumi.engine.llama.binding.tokenizer import Tokenizer
from cogumi.engine.llama.jobs import Adaptation, Measurement, Prefill, Shot
from cogumi.engine.llama.prefix_reuse import Held, choose
from cogumi.engine.llama.speculative.drafter import Draft
from cogumi.engine.llama.speculative.drafting import Speculation
from cogumi.engine.llama.speculative.speculation import verify_greedy, verify_sampled
from cogumi.engine.sampling import Rules, probabilities, signals, top_logprobs

Logits = NDArray[np.float32]
Job: TypeAlias = Generation | Measurement | Prefill

PATIENCE, LEAST_READ = 0.25, 16
"""Seconds by which reading a prompt may hold up those who write, and the tokens that are read all the same."""


class _Settled(NamedTuple):
    """The tokens that one turn settled for a generation, and the row of logits behind the first of them."""

    sequence: int
    job: Generation
    tokens: list[int]
    draft: Draft | None
    at: int


class Lane:
    """The context of one adapter and the jobs in its sequences."""

    def __init__(self, base: Context, tokenizer: Tokenizer, speculation: Speculation | None) -> None:
        self._base, self._tokenizer, self._speculation = base, tokenizer, speculation
        self._jobs: dict[int, Job] = {}
        self._held = {sequence: Held() for sequence in range(base.sequences)}
        self._turns = 0
        self._token_seconds = 0.0  # what reading a prompt token takes, as far as known

    def __len__(self) -> int:
        return len(self._jobs)

    @property
    def jobs(self) -> list[Job]:
        """Everything in progress."""
        return list(self._jobs.values())

    def join(self, job: Job) -> None:
        """Give a job the free sequence whose cache serves it best."""
        free, most = {s: held for s, held in self._held.items() if s not in self._jobs}, _reusable(job)
        sequence, common = choose(job.ids if most else (), free)
        held = self._held[sequence]
        job.cached = min(common, most)
        if job.cached < len(held.ids):
            self._base.trim(sequence, job.cached)
        if isinstance(job, Generation):
            job.reused = job.cached
        held.ids = []
        self._jobs[sequence] = job

    def sweep(self) -> None:
        """Free the places of cancelled jobs."""
        for sequence, job in list(self._jobs.items()):
            if job.cancelled:
                self._leave(sequence)
                job.end("cancelled")

    def turn(self) -> None:
        """Run one batch of each kind, as far as there is work. A batch that fails takes only its own jobs with it."""
        try:
            self._measure()
            self._adapt()
            self._generate()
        except Exception as error:  # handed to all whom it concerns
            self._lose(error)

    def close(self) -> None:
        """Free the contexts."""
        self._base.close()
        if self._speculation:
            self._speculation.close()

    def _leave(self, sequence: int) -> None:
        """End a job's stay; what is cached of it stays too."""
        job = self._jobs.pop(sequence)
        self._turns += 1
        self._base.trim(sequence, job.cached)
        self._held[sequence] = Held(job.ids[: job.cached], self._turns)

    def _lose(self, error: Exception) -> None:
        """The context cannot be trusted any more: everybody in it fails, and it starts anew."""
        jobs, self._jobs = self.jobs, {}
        self._base.clear()
        self._base.want_hidden(False)
        self._held = {sequence: Held() for sequence in self._held}
        for job in jobs:
            job.fail(error)

    def _measure(self) -> None:
        """Every token is an output, as llama.cpp demands where hidden states are wanted.

        A text is cut at the same places in a crowd as alone, so that sums over its states are the same bits.
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
        self._base.want_hidden(hidden)
        logits = self._base.decode(rows)
        states = self._base.hidden() if hidden else None
        self._base.want_hidden(False)
        at = 0
        for row in rows:
            job, here = jobs[row.sequence], slice(at, at + row.outputs)
            job.take(logits[here], states[here] if states is not None and job.hidden else None)
            at += row.outputs
            if job.cached < len(job.ids):
                continue
            if isinstance(job, Measurement):
                self._leave(row.sequence)
                job.end()
            else:
                self._base.trim(row.sequence, 0)

    def _adapt(self) -> None:
        """A step of descent for every head whose examples are read."""
        for job in self._jobs.values():
            if isinstance(job, Adaptation) and not job.ready and job.unread is None:
                job.step()

    def _generate(self) -> None:
        writing: dict[int, Generation] = {}
        adapted: dict[int, Adaptation] = {}
        reading: dict[int, Generation | Prefill] = {}
        for sequence, job in self._jobs.items():
            last = len(job.ids) - job.cached == 1
            if isinstance(job, Measurement) or (isinstance(job, Adaptation) and not job.ready):
                continue
            if isinstance(job, Adaptation) and last:
                adapted[sequence] = job
            elif isinstance(job, Generation) and last and not job.echoing:
                writing[sequence] = job
            else:
                reading[sequence] = job
        if writing or reading:
            self._advance(writing, reading)
        if adapted:
            self._advance_adapted(adapted)

    def _advance_adapted(self, adapted: dict[int, Adaptation]) -> None:
        """Choose by adapted heads. Each adds to its own row, so that the others of the batch change no bit."""
        rows = [_last(sequence, job, None) for sequence, job in adapted.items()]
        self._base.want_hidden(True)
        logits, states = self._base.decode(rows), self._base.hidden()
        self._base.want_hidden(False)
        own = [job.low_rank.apply(logits[i], states[i]) for i, job in enumerate(adapted.values())]
        self._settle(rows, {}, np.stack(own))

    def _advance(self, writing: dict[int, Generation], reading: dict[int, Generation | Prefill]) -> None:
        drafts: dict[int, Draft] = {}
        if self._speculation and writing:
            drafts = self._speculation.propose(writing, self._base.outputs, self._base.sequences)
        rows = [_last(sequence, job, drafts.get(sequence)) for sequence, job in writing.items()]
        rows += self._chunks(reading, len(rows), sum(len(row.tokens) for row in rows))
        began = time.perf_counter()
        logits = self._base.decode(rows)
        self._clock(rows, len(writing), time.perf_counter() - began)
        self._settle(rows, drafts, logits)

    def _clock(self, rows: list[Row], writing: int, seconds: float) -> None:
        """Learn from the time that a batch took, in which so many rows were of those who write."""
        sizes = [len(row.tokens) for row in rows]
        if len(rows) > writing:
            if sum(sizes) >= LEAST_READ:
                self._token_seconds = seconds / sum(sizes)
        elif self._speculation and len(set(sizes)) == 1:  # one pass of llama.cpp
            self._speculation.observe(sum(sizes), seconds)

    def _chunks(self, reading: dict[int, Generation | Prefill], writing: int, taken: int) -> list[Row]:
        """As much of the prompts as fits beside the `taken` tokens of those who write, and as these can bear.

        Who only reads ahead comes last.
        """
        rows: list[Row] = []
        room = self._base.batch - taken
        patience = PATIENCE * max(len(reading) / max(writing, 1), 1.0)  # those who wait to begin count as well
        if taken and self._token_seconds * room > patience:
            room = max(int(patience / self._token_seconds), LEAST_READ)
        outputs = self._base.outputs - taken
        for sequence, job in sorted(reading.items(), key=lambda item: isinstance(item[1], Prefill)):
            echoes = isinstance(job, Generation) and job.request.echo
            end = len(job.ids) - isinstance(job, Adaptation)  # whose last token needs its hidden state as well
            run = job.ids[job.cached : min(job.cached + (min(room, outputs) if echoes else room), end)]
            if not run or outputs == 0:
                break
            ends = job.cached + len(run) == len(job.ids) and isinstance(job, Generation)
            rows.append(Row(sequence, run, job.cached, len(run) if echoes else int(ends)))
            room, outputs = room - len(run), outputs - rows[-1].outputs
        return rows

    def _settle(self, rows: list[Row], drafts: dict[int, Draft], logits: Logits) -> None:
        """Verify what was drafted, choose what comes next, and bring jobs and cache in line with it."""
        best = logits.argmax(axis=1)
        settled: list[_Settled] = []
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
                if tokens := self._choose(sequence, job, draft, logits[here], best[here]):
                    settled.append(_Settled(sequence, job, tokens, draft, here.start))
                continue
            job.cached = start + len(run)
            if job.cached == len(job.ids):  # nothing but the prompt was to be read
                self._leave(sequence)
                job.end("length")
        if settled:
            self._emit(logits, settled)

    def _choose(
        self, sequence: int, job: Generation, draft: Draft | None, logits: Logits, best: NDArray[np.intp]
    ) -> list[int]:
        """The tokens that one pass of the base settles for a generation; none if it fails, which ends it."""
        try:
            tokens = _verify(job, draft, logits, best)
        except RequestError as error:
            self._leave(sequence)
            job.fail(error)
            return []
        if draft:
            job.drafted += len(draft.tokens)
            job.accepted += len(tokens) - 1
        if self._speculation:
            self._speculation.learn(sequence, draft, tokens)
        return tokens

    def _look_back(self, sequence: int, job: Generation) -> None:
        """Read once more the token before an answer's last one, for the hidden state behind it.

        While prompts are read beside it, hidden states would make every token of theirs an output.
        """
        again = Measurement(job.ids[:-1], len(job.ids) - 1, hidden=True)
        again.cached = len(again.ids) - 1
        self._base.trim(sequence, again.cached)
        self._jobs[sequence] = again

        def tell(done: Future[Measurement]) -> None:
            error = done.exception()
            if error is None:
                job.tell(tuple(done.result().last.tolist()))
            elif isinstance(error, RequestError):  # the engine was closed
                job.end("cancelled")
            elif isinstance(error, Exception):
                job.fail(error)

        again.result.add_done_callback(tell)

    def _emit(self, logits: Logits, settled: list[_Settled]) -> None:
        """Hand out the settled tokens with their signals."""
        outputs = [at for one in settled for at in range(one.at, one.at + len(one.tokens))]
        chosen = [token for one in settled for token in one.tokens]
        rows = logits if len(outputs) == len(logits) else logits[outputs]
        told = signals(rows, np.array(chosen))
        i = 0
        for sequence, job, tokens, draft, _ in settled:
            drafted = draft.tokens if draft else []
            for j, token in enumerate(tokens):
                is_end = self._tokenizer.ends(token)
                agreed = token == drafted[j] if j < len(drafted) else None
                top = top_logprobs(rows[i + j], job.request.logprobs)
                if job.emit(token, self._tokenizer.piece(token), is_end, told[i + j], agreed, top):
                    break
            job.cached = len(job.ids) - 1
            if job.ended and job.request.hidden:
                self._look_back(sequence, job)
            elif job.ended:
                self._leave(sequence)
            elif len(tokens) <= len(drafted):
                self._base.trim(sequence, job.cached)
            i += len(tokens)


def _measured(job: Job) -> Measurement | Shot | None:
    """What is to be measured for a job."""
    if isinstance(job, Adaptation):
        return job.unread
    return job if isinstance(job, Measurement) else None


def _reusable(job: Job) -> int:
    """How many tokens need not be read again: all but those whose outputs are wanted; none if examples come first."""
    if isinstance(job, Adaptation):
        return 0
    if isinstance(job, Measurement):
        return 0 if job.hidden else job.first - 1
    echoes = isinstance(job, Generation) and job.request.echo
    return 0 if echoes else len(job.ids) - 1


def _last(sequence: int, job: Generation, draft: Draft | None) -> Row:
    """The row of one who writes: the last token, and the drafted ones behind it."""
    run = [job.ids[-1], *(draft.tokens if draft else ())]
    return Row(sequence, run, job.cached, len(run))


def _verify(job: Generation, draft: Draft | None, logits: Logits, best: NDArray[np.intp]) -> list[int]:
    """The tokens that one pass settles; `logits` and `best` hold a row behind each token of the run."""
    drafted, rules, request = draft.tokens if draft else [], job.rules, job.request

    def ruled(i: int) -> Rules | None:
        if rules and i:
            rules.accept(drafted[i - 1])  # row i is asked for only if the draft before it was settled
        return rules

    if job.generator is None:

        def greedy(i: int) -> int:
            now = ruled(i)
            return now.best(logits[i]) if now else int(best[i])

        tokens = verify_greedy(drafted, greedy)
    else:

        def distribution(i: int) -> NDArray[np.float64]:
            now = ruled(i)
            return probabilities(now.apply(logits[i]) if now else logits[i], request.temperature, request.top_p)

        tokens = verify_sampled(drafted, draft.drawn_from if draft else None, distribution, job.generator)
    if rules:
        rules.accept(tokens[-1])
    return tokens
