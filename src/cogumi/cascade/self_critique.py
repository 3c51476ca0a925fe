"""Self-critique: a small critic scores an answer; a poor one is given again, and the best one stands (SPEC F14)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from cogumi.cascade.self_consistency import SAMPLING, Sampling, gather, spent
from cogumi.confidence.critic_net import NONE, critic_input, load_critic, passage
from cogumi.core.errors import RequestError
from cogumi.core.text import last_user_message
from cogumi.core.types import Message, Reply, Request, Usage
from cogumi.engine.protocol import Engine

MOST_ROUNDS = 3
HINT = "That answer may be wrong. Kind of error: {error}. Look at: {passage}. Answer the question again, corrected."


@dataclass(frozen=True, slots=True)
class Critique:
    """`score` is ten times the calibrated chance that the answer is right; `error` its likeliest error (of
    `confidence.critic_net.ERRORS`), "none" from a score of 5 on; `passage` the words that the critic looked at most.
    """

    score: float
    error: str
    passage: str


class Critic:
    """The critic in the file `path` (critic.safetensors); raises `BundleError` if it is none."""

    def __init__(self, path: Path) -> None:
        self._net = load_critic(path)

    def judge(self, question: str, reply: Reply) -> Critique:
        """Judge an answer by the question and its tokens alone; any texts."""
        opinion = self._net.judge(critic_input(question, reply))
        error = opinion.error if opinion.p_correct < 0.5 else NONE
        return Critique(10 * opinion.p_correct, error, passage(reply.tokens, opinion.attention))


@dataclass(frozen=True, slots=True)
class Improved:
    """`reply` is the best-scored answer, `critique` its; `critiques` are those of all answers in the order given.

    `usage` is what the answers after the first cost.
    """

    reply: Reply
    critique: Critique
    critiques: tuple[Critique, ...]
    usage: Usage


def improve(
    engine: Engine,
    request: Request,
    reply: Reply,
    critic: Critic,
    *,
    rounds: int = 1,
    below: float = 7.0,
    answers: int = 1,
    tell: bool = True,
    sampling: Sampling = SAMPLING,
) -> Generator[None, None, Improved]:
    """While the best answer scores under `below`: up to `rounds` times sample `answers` more and keep the best.

    With `tell` the model sees its answer and the named problem before it answers again. The critic never does: it reads
    the question as it was asked. Yields None while waiting; closing it cancels. An engine that refuses the further
    answers (no room in the context, too many requests) ends the rounds: the best so far stands. Raises `RequestError`
    for more than 3 rounds.
    """
    if not 0 <= rounds <= MOST_ROUNDS:
        raise RequestError(f"{rounds} rounds of critique; give 0 to {MOST_ROUNDS}")
    question = question_of(request)
    best = Improved(reply, first := critic.judge(question, reply), (first,), Usage())
    for done in range(rounds):
        if best.critique.score >= below:
            break
        asked = told(request, best.reply, best.critique) if tell else request
        try:
            found = yield from gather(engine, sampling.requests(asked, answers, first=done * answers))
        except RequestError:
            break
        judged = [critic.judge(question, one) for one in found]
        whole = [i for i, one in enumerate(found) if one.finish_reason == "stop" and one.text.strip()]
        top = max(whole, key=lambda i: judged[i].score, default=None)
        best = replace(best, critiques=(*best.critiques, *judged), usage=best.usage + spent(found))
        if top is not None and judged[top].score > best.critique.score:
            best = replace(best, reply=found[top], critique=judged[top])
    return best


def question_of(request: Request) -> str:
    """What the critic takes for the question: the last user message, or the raw prompt's text."""
    if isinstance(request.prompt, str):
        return request.prompt
    return last_user_message(request.messages)


def told(request: Request, reply: Reply, critique: Critique) -> Request:
    """The request with the answer and what is wrong with it behind; a raw prompt stays as it is."""
    if request.prompt is not None:
        return request
    error = "unclear" if critique.error == NONE else critique.error
    hint = HINT.format(error=error, passage=critique.passage or "all of it")
    return replace(request, messages=(*request.messages, Message("assistant", reply.text), Message("user", hint)))
