"""The records shared by all packages: small, frozen, standard library only.

Log-probabilities are natural logarithms (nats); ids are token ids of the tier's own tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ABSTENTION = "I don't know."
"""The answer with which every tier declines a question."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant.

    For templates that know tools it may also be `tool`, the result of a call; `calls` of an assistant's turn are JSON
    texts of the form {"name", "arguments"}.
    """

    role: str
    content: str
    calls: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Example:
    """A question with its reference answer. `difficulty` is a level from 1 (easy) to 5, or 0 without a level.

    `meta["check"]`, if present, names the grader and its arguments (see `grading.graders`); read it as `check`.
    """

    id: str
    domain: str
    difficulty: int
    messages: tuple[Message, ...]
    answer: str
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def check(self) -> Mapping[str, Any]:
        """How an output is judged: `meta["check"]`, or the default grader `exact`."""
        found: Mapping[str, Any] = self.meta.get("check", {"kind": "exact"})
        return found

    @property
    def answerable(self) -> bool:
        """Whether the question has an answer; if not, the correct output is `ABSTENTION`."""
        return self.check.get("kind") != "abstain"


@dataclass(frozen=True, slots=True)
class Request:
    """A request to an engine: `messages` (rendered by the chat template), or a raw `prompt` in the model's own format:
    names of special tokens in it are these tokens, and bos comes first where the model wants one.

    `max_tokens` None: as many as the context leaves. `logit_bias` (id -> value added to its logit) and the penalties
    follow OpenAI's API: `presence_penalty` is subtracted once from the logit of each id generated so far,
    `frequency_penalty` once per occurrence; `repetition_penalty` divides the positive logits of ids of the prompt and
    the answer and multiplies their negative ones. Sampling draws from the `top_k` best ids (0: all) with at least
    `min_p` times the probability of the best. The end token is forbidden before `min_tokens` tokens. `grammar` (GBNF),
    `json_schema` (JSON text) and `lark` (a grammar of llguidance) constrain the answer. `tools` are JSON texts of
    functions {"name", "description", "parameters"}, for a chat template that knows tools. `echo`
    requests the prompt's log-probabilities. `speculate`: True forces drafting, False forbids it, None lets the engine
    choose. `abstain` withholds an answer that is not accepted, `note` appends a sentence to it that says so. `user` and
    `session` partition memory and caches, `id` identifies the answer for ratings; `files` are names of files that the
    question is about (`main.py`). `hidden` requests the hidden state of the answer. `progressive` streams the draft's
    answer at once and revises it. `examples` are (question, answer) pairs to imitate; `adapt`: True adapts the model's
    head to them (an engine without such a head refuses), False puts them in the prompt, None adapts if there is a head.
    Scores and readings always use them in the prompt.
    """

    messages: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int = 0
    echo: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    grammar: str | None = None
    json_schema: str | None = None
    lark: str | None = None
    tools: tuple[str, ...] = ()
    adapter: str | None = None
    speculate: bool | None = None
    mode: str | None = None
    abstain: bool = False
    note: bool = False
    user: str | None = None
    session: str | None = None
    id: str | None = None
    files: tuple[str, ...] = ()
    hidden: bool = False
    progressive: bool = False
    examples: tuple[tuple[str, str], ...] = ()
    adapt: bool | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token with the signals of the forward pass that generated it.

    `margin` is the log-probability gap between the two best tokens, `entropy` in nats, `top` the best alternatives
    `(id, logprob)` if requested. All refer to the unscaled model distribution (temperature 1), so that they do not
    depend on the sampling options. `text` may be empty while a multi-byte character is incomplete.
    """

    id: int
    text: str
    logprob: float
    entropy: float
    margin: float
    draft_agreed: bool | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts over all attempts of a cascade; `drafted` and `accepted` are those of speculation."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.cached_tokens + other.cached_tokens,
            self.drafted + other.drafted,
            self.accepted + other.accepted,
        )


@dataclass(frozen=True, slots=True)
class Decision:
    """One step of the cascade with its reason; shown to the user."""

    tier: str
    signal: str
    value: float
    threshold: float
    accepted: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Revision:
    """Replaces everything streamed so far by `text`."""

    text: str


@dataclass(frozen=True, slots=True)
class Reply:
    """The last event of every generation: the whole text, its cost, and the decisions behind it.

    `finish_reason` is stop, length or cancelled. From a cascade, `tier` is the model that answered, `p_correct` is
    calibrated, `route` is the path taken (see `cascade.cascade`), and `accepted` means that the guarantee covers this
    answer; `id` is the request's, for ratings. Other engines leave `p_correct` None and `accepted` False. `prompt`, if
    the request sets `echo`, has all tokens of the prompt but the first, which has no prediction. `hidden`, if
    requested, is the state after the final norm from which the answer's last token was chosen.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: str
    usage: Usage
    signals: Mapping[str, float] = field(default_factory=dict)
    decisions: tuple[Decision, ...] = ()
    tier: str = ""
    route: str = ""
    p_correct: float | None = None
    prompt: tuple[Token, ...] = ()
    hidden: tuple[float, ...] = ()
    accepted: bool = False
    id: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """Summed negative log-likelihood of a text: `nats` over `tokens` tokens and `bytes` UTF-8 bytes.

    `greedy`: whether each token is the most likely one at its position, so that greedy decoding gives this text; None
    if unknown.
    """

    nats: float
    tokens: int
    bytes: int
    greedy: bool | None = None

    @property
    def perplexity(self) -> float:
        """exp(nats per token); comparable only for the same tokenizer."""
        return math.exp(self.nats / max(self.tokens, 1))

    @property
    def bits_per_byte(self) -> float:
        """Comparable across tokenizers."""
        return self.nats / math.log(2) / max(self.bytes, 1)


@dataclass(frozen=True, slots=True)
class Reading:
    """Result of one pass over a question: its score, and hidden states after the final norm.

    `surprise` has the nats of each token from the last message on (of a raw prompt, from the second token on); `last`
    is the hidden state of the last position, `mean` the average over the scored positions and the one before (both
    [hidden]).
    """

    score: Score
    surprise: tuple[float, ...]
    last: tuple[float, ...]
    mean: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A grader's judgement of one output; `score` in [0, 1]."""

    example_id: str
    output: str
    correct: bool
    score: float
    grader: str
    reason: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished folder on disk, described by its manifest."""

    kind: str
    path: Path
    fingerprint: str
    parents: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
