"""The parts of bodies and responses that chat and completions share.

Sampling parameters of other servers (vLLM, llama.cpp) are honoured. Keys without effect (`metadata`, unknown keys) are
accepted, and named in the response's `cogumi.ignored`; unsupported features (such as tools) are refused by name.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from cogumi.core.types import Reply, Request, Token, Usage
from cogumi.core.version import __version__
from cogumi.engine.few_shot import MAX_EXAMPLES
from cogumi.engine.reply_extension import extension
from cogumi.engine.sampling import MAX_REPETITION


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`; only `include_usage` has an effect."""

    include_usage: bool = False


class WorkedExample(BaseModel):
    """A question with its answer, for few-shot prompting."""

    model_config = ConfigDict(extra="forbid")

    question: Annotated[str, Field(min_length=1)]
    answer: Annotated[str, Field(min_length=1)]


class CogumiOptions(BaseModel):
    """Options beyond OpenAI's API, under the request's key `cogumi`."""

    model_config = ConfigDict(extra="forbid")

    mode: str | None = None
    modifier: str | None = None
    speculate: bool | None = None
    abstain: bool = False
    note: bool = False
    session: str | None = None
    files: Annotated[list[str], Field(max_length=100)] = []
    progressive: bool = False
    examples: Annotated[list[WorkedExample], Field(min_length=1, max_length=MAX_EXAMPLES)] | None = None
    adapt: bool | None = None


def _listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _unset(value: Any) -> Any:
    """-1 stands for "not set" in llama.cpp's and vLLM's APIs: a random seed, all tokens that are left, any token."""
    return None if type(value) is int and value == -1 else value


Unsettable = BeforeValidator(_unset)
WITHOUT_END = 2**31
"""Least number of tokens of an answer that must not end by itself: more than any context holds."""


class Body(BaseModel):
    """The common keys of requests for text.

    `unsupported`: keys of unsupported features, each with the values (besides null) that have no effect.
    """

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "grammar": (),
        "guided_choice": (),
        "guided_grammar": (),
        "guided_regex": (),
        "structured_outputs": (),
        "prompt_logprobs": (),
        "use_beam_search": (False,),
    }

    model: str
    max_tokens: Annotated[Annotated[int, Field(ge=1)] | None, Unsettable] = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Annotated[int, Field(ge=0)] | None, Unsettable] = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=16)] | None = None
    seed: Annotated[Annotated[int, Field(ge=0)] | None, Unsettable] = None
    stop: Annotated[list[Annotated[str, Field(min_length=1)]] | None, BeforeValidator(_listed)] = None
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100, le=100)]] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[
        Annotated[float, Field(gt=0, le=MAX_REPETITION)] | None,
        Field(validation_alias=AliasChoices("repetition_penalty", "repeat_penalty")),
    ] = None
    guided_json: dict[str, Any] | str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cogumi: CogumiOptions = CogumiOptions()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            raise ValueError("the body must be a JSON object (send it with content-type: application/json)")
        try:
            json.dumps(body, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ValueError("the body holds half of a surrogate pair; send whole characters") from error
        for key, harmless in cls.unsupported.items():
            value = body.get(key)
            if value is not None and value not in harmless:
                raise ValueError(f"{key} is not supported by this version of cogumi; leave it out")
        return body

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with a usage chunk."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def guided_schema(self) -> str | None:
        """vLLM's `guided_json`, an object or its text, as JSON text."""
        return json.dumps(self.guided_json) if isinstance(self.guided_json, dict) else self.guided_json

    @property
    def ignored(self) -> dict[str, list[str]]:
        """For the `cogumi` object: as `ignored` the names of keys without effect, if there are any."""
        extra = self.model_extra or {}
        names = sorted(key for key, value in extra.items() if value is not None and key not in self.unsupported)
        return {"ignored": names} if names else {}

    def choices(self, **own: Any) -> list[Request]:
        """One engine request per choice, with the fields `own`; with a `seed`, choice i uses `seed + i`.

        Missing keys have the defaults of `Request`.
        """
        asked: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "min_tokens": WITHOUT_END if self.ignore_eos else self.min_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "logit_bias": self.logit_bias,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
        } | own
        return [
            Request(
                stop=tuple(self.stop or ()),
                seed=None if self.seed is None else self.seed + index,
                adapter=self.cogumi.modifier,
                speculate=self.cogumi.speculate,
                mode=self.cogumi.mode,
                abstain=self.cogumi.abstain,
                note=self.cogumi.note,
                user=self.user,
                session=self.cogumi.session,
                files=tuple(self.cogumi.files),
                progressive=self.cogumi.progressive,
                examples=tuple((one.question, one.answer) for one in self.cogumi.examples or ()),
                adapt=self.cogumi.adapt,
                **{key: value for key, value in asked.items() if value is not None},
            )
            for index in range(self.n or 1)
        ]


class Feedback(BaseModel):
    """Body of `POST /v1/feedback`: whether the answer `id` was right; `user`: the user of that answer."""

    model_config = ConfigDict(extra="forbid")
    id: Annotated[str, Field(min_length=1, max_length=200)]
    right: bool
    user: str | None = None


class PersonalChoice(BaseModel):
    """Body of `POST /v1/personal`: whether personal routing is on for that user."""

    model_config = ConfigDict(extra="forbid")
    user: Annotated[str, Field(min_length=1)]
    on: bool


class NewModifier(BaseModel):
    """Body of `POST /v1/modifiers`: the `name` of a modifier, and the name of its `file` in the server's folder."""

    model_config = ConfigDict(extra="forbid")
    name: Annotated[str, Field(min_length=1, max_length=100)]
    file: Annotated[str, Field(min_length=1, max_length=255)]


class ResponseBuilder(Protocol):
    """Builds the JSON objects of one response; every chunk of a stream carries the same id, time and model."""

    head: dict[str, Any]
    """The first keys of every object."""
    include_usage: bool
    """Whether a stream ends with `usage_chunk`."""
    wants_tokens: bool
    """Whether a token without text gets a chunk of its own."""

    def completion(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """The whole response, from the reply of every choice."""

    def chunks(
        self, index: int, text: str, tokens: Sequence[Token], *, first: bool, reply: Reply | None
    ) -> list[dict[str, Any]]:
        """The chunks of one event of choice `index`; `reply` ends the choice."""

    def usage_chunk(self, usages: Sequence[Usage]) -> dict[str, Any]:
        """The chunk without choices that ends a stream with `include_usage`; `usages` of all choices in order."""


def new_head(prefix: str, model: str) -> dict[str, Any]:
    """The first keys of every object of one response; `created` in Unix seconds."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"cogumi-{__version__}",
    }


def answer_id(completion: str, index: int) -> str:
    """The id for ratings of a choice; that of the first choice is the id of the response."""
    return f"{completion}-{index}" if index else completion


def extensions(replies: Sequence[Reply]) -> dict[str, Any]:
    """The `cogumi` object of a whole response: that of the first choice; `choices` has all if there are several."""
    first = extension(replies[0])
    return first | ({"choices": [extension(reply) for reply in replies]} if len(replies) > 1 else {})


def usage_object(usages: Sequence[Usage], n: int) -> dict[str, Any]:
    """OpenAI's `usage` of all choices, `n` of each prompt one after the other: a prompt counts once."""
    prompt_tokens = sum(usage.prompt_tokens for usage in usages[::n])
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages[::n])},
    }


def best_logprobs(token: Token) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The token's log-probability and those of the best ids; the floats are equal, because clients compare them."""
    return dict(token.top).get(token.id, token.logprob), token.top
