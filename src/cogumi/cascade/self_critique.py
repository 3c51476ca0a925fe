"""Self-critique: a critic scores an answer; below a score, new answers are sampled, the best is kept (SPEC F14)."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path

from cogumi.cascade.self_consistency import SAMPLING, Sampling, gather, total_usage
from cogumi.confidence.critic_net import NONE, critic_input, load_critic, passage
from cogumi.core.errors import RequestError
from cogumi.core.text import last_user_message
from cogumi.core.types import Message, Reply, Request, Usage
from cogumi.engine.protocol import Engine

MAX_ROUNDS = 3
HINT = "That answer may be wrong. Kind of error: {error}. Look at: {passage}. Answer the question again, corrected."


@dataclass(frozen=True, slots=True)
class Critique:
    """`score`: ten times the calibrated P(correct). `error`: the most likely error (of `confidence.critic_net.ERRORS`),
    "none" for scores of 5 and more. `passage`: the words with the most attention of the critic.
    """

    score: float
    error: str
    passage: str


class Critic:
    """The critic in the file `path` (critic.safetensors); raises `BundleError` for an invalid file."""

    def __init__(self, path: Path) -> None:
        self._net = load_critic(path)

    def judge(self, question: str, reply: Reply) -> Critique:
        """Judge an answer by the question's text and the answer's tokens."""
        opinion = self._net.judge(critic_input(question, reply))
        error = opinion.error if opinion.p_correct < 0.5 else NONE
        return Critique(10 * opinion.p_correct, error, passage(reply.tokens, opinion.attention))


@dataclass(frozen=True, slots=True)
class Improved:
    """`reply`: the answer with the best score, `critique`: its critique, `critiques`: those of all answers in order.

    `usage` covers the answers after the first.
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
    hint: bool = True,
    sampling: Sampling = SAMPLING,
) -> Generator[None, None, Improved]:
    """While the best score is below `below`: sample `answers` more, up to `rounds` times, and keep the best.

    With `hint`, the model gets its answer and the critic's objection before it answers again; the critic always reads
    the original question. Yields None while waiting; closing the generator cancels. If the engine refuses the new
    answers (context too small, too many requests), the best answer so far is returned. Raises `RequestError` for more
    than 3 rounds.
    """
    if not 0 <= rounds <= MAX_ROUNDS:
        raise RequestError(f"rounds of critique is {rounds}; give 0 to {MAX_ROUNDS}")
    question = question_of(request)
    best = Improved(reply, first := critic.judge(question, reply), (first,), Usage())
    for done in range(rounds):
        if best.critique.score >= below:
            break
        asked = with_hint(request, best.reply, best.critique) if hint else request
        try:
            found = yield from gather(engine, sampling.requests(asked, answers, first=done * answers))
        except RequestError:
            break
        judged = [critic.judge(question, one) for one in found]
        whole = [i for i, one in enumerate(found) if one.finish_reason == "stop" and one.text.strip()]
        top = max(whole, key=lambda i: judged[i].score, default=None)
        best = replace(best, critiques=(*best.critiques, *judged), usage=best.usage + total_usage(found))
        if top is not None and judged[top].score > best.critique.score:
            best = replace(best, reply=found[top], critique=judged[top])
    return best


def question_of(request: Request) -> str:
    """The question as the critic reads it: the last user message, or the text of a raw prompt."""
    if isinstance(request.prompt, str):
        return request.prompt
    return last_user_message(request.messages)


def with_hint(request: Request, reply: Reply, critique: Critique) -> Request:
    """Append the answer and a hint about its error to the request; a raw prompt is unchanged."""
    if request.prompt is not None:
        return request
    error = "unclear" if critique.error == NONE else critique.error
    text = HINT.format(error=error, passage=critique.passage or "all of it")
    return replace(request, messages=(*request.messages, Message("assistant", reply.text), Message("user", text)))
