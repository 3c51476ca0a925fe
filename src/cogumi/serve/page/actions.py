"""What the controls of the page do (SPEC G2). The server keeps nothing of a conversation; see `conversations`."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
from gradio.events import Dependency
from pydantic import ValidationError

from cogumi.core.errors import CogumiError, RequestError
from cogumi.engine.few_shot import MAX_EXAMPLES, read_pairs
from cogumi.engine.reply_extension import read_extension
from cogumi.serve.page.api_client import ApiClient
from cogumi.serve.page.controls import AUTO, EXAMPLES, Controls
from cogumi.serve.page.conversations import Conversation, Turn

EVERY = 0.05
"""Seconds between two updates of a streamed answer."""
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
"""Options of all events: no overlay while they run; they are no part of Gradio's own API."""
KeyOf = Callable[[gr.Request], str | None]
"""The API key of the person who is signed in."""


class Settings(NamedTuple):
    """The values of the controls, in the order in which every question receives them."""

    mode: str
    modifier: str
    decline: bool
    system: str
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    examples: list[dict[str, str]]

    def body(self, conversation: Conversation) -> dict[str, Any]:
        """The chat request for the conversation's last question."""
        own: dict[str, Any] = {"abstain": self.decline}
        if self.mode != AUTO:
            own["mode"] = self.mode
        if self.modifier != AUTO:
            own["modifier"] = self.modifier
        if self.examples:
            own["examples"] = self.examples
        before = [{"role": "system", "content": self.system}] if self.system.strip() else []
        return {
            "model": "cogumi",
            "messages": [*before, *conversation.messages],
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
            "user": conversation.user,
            "cogumi": own,
        }


def connect(blocks: gr.Blocks, controls: Controls, client: ApiClient, key_of: KeyOf) -> None:
    """Connect the controls with the API behind `client`."""
    sent, rated = _sending(controls, client, key_of), _rating(controls, client, key_of)
    _conversations(blocks, controls, [sent, rated])
    _settings(blocks, controls, client, key_of)
    _saving(controls)


def _sending(controls: Controls, client: ApiClient, key_of: KeyOf) -> Dependency:
    """Sending, streaming and stopping; returns the event that sends."""

    async def send(
        request: gr.Request, asked: str, kept: Any, *values: Any
    ) -> AsyncGenerator[tuple[Any, dict[str, Any], list[dict[str, Any]]]]:
        """Stream the answer; if there is none, the question returns to its box."""
        settings, held = Settings(*values), _read(kept)
        if not asked.strip():
            yield _idle(asked), held.model_dump(mode="json"), held.rows()
            return
        answer = Turn(role="assistant", content="")
        whole = held.model_copy(update={"turns": [*held.turns, Turn(role="user", content=asked), answer]})
        yield _busy(), whole.model_dump(mode="json"), whole.rows()
        told = time.monotonic()
        try:
            async for piece in client.answer(key_of(request), settings.body(whole)):
                answer.id, answer.content = piece.id, answer.content + piece.text
                if piece.cogumi is not None:
                    answer.cogumi = read_extension(piece.cogumi)
                elif time.monotonic() - told >= EVERY:
                    yield _busy(), whole.model_dump(mode="json"), whole.rows()
                    told = time.monotonic()
        except RequestError as error:
            gr.Warning(str(error), duration=20)
            if not answer.content:
                yield _idle(asked), held.model_dump(mode="json"), held.rows()
                return
        yield _idle(), whole.model_dump(mode="json"), whole.rows()

    answered = [controls.question, controls.conversation, controls.chat]
    given = [controls.question, controls.conversation, *controls.settings]
    sent = controls.question.submit(send, given, answered, concurrency_limit=None, trigger_mode="once", **QUIET)
    stopped = controls.question.stop(_idle, None, controls.question, cancels=[sent], queue=False, **QUIET)
    for event in (sent, stopped):
        event.then(None, controls.conversation, controls.history, js="cogumi.remember")
    return sent


def _rating(controls: Controls, client: ApiClient, key_of: KeyOf) -> Dependency:
    """Thumbs; returns the event that sends one."""

    async def rate(found: gr.LikeData, kept: Any, request: gr.Request) -> tuple[dict[str, Any] | None, Any]:
        """Send a thumb as feedback; a thumb that the server refuses is taken back."""
        held = _read(kept)
        at = held.answer_at(found.index if isinstance(found.index, int) else found.index[0])
        if at is None or not held.turns[at].id or not isinstance(found.liked, bool):
            return None, gr.Chatbot(feedback_value=held.ratings)
        try:
            await client.rate(key_of(request), held.turns[at].id, found.liked, held.user)
        except RequestError as error:
            gr.Warning(str(error))
            return None, gr.Chatbot(feedback_value=held.ratings)
        return {"turn": at, "right": found.liked}, gr.skip()

    # The conversation may go on while a rating is on its way: the browser changes only the rated turn.
    rating, conversation = gr.JSON(visible="hidden"), controls.conversation
    rated = controls.chat.like(rate, controls.conversation, [rating, controls.chat], **QUIET)
    rated.then(None, [conversation, rating], conversation, js="cogumi.rated").then(
        None, conversation, controls.history, js="cogumi.remember"
    )
    return rated


def _conversations(blocks: gr.Blocks, controls: Controls, running: list[Dependency]) -> None:
    """New, old and forgotten conversations; a running answer ends, and what there is of it is kept.

    Everything that may still write into the chat is cancelled, or it would write into the next conversation.
    """
    conversation = controls.conversation
    opened = controls.history.input(
        None,
        [controls.history, conversation],
        [conversation, controls.question],
        js="(id, left) => (cogumi.remember(left), cogumi.find(id))",
        cancels=running,
    ).then(_shown, conversation, controls.chat, **QUIET)
    begun, ended = [conversation, controls.question, controls.chat, controls.history], [*running, opened]
    blocks.load(None, None, begun, js="cogumi.fresh")
    blocks.load(None, None, controls.sidebar, js="cogumi.roomy")
    controls.reasons.input(None, controls.reasons, None, js="cogumi.explain")
    for on in (controls.new.click, controls.chat.clear):
        on(None, conversation, begun, js="(left) => (cogumi.remember(left), cogumi.fresh())", cancels=ended)
    controls.forget.click(None, None, begun, js="() => (cogumi.forget(), cogumi.fresh())", cancels=ended)


def _settings(blocks: gr.Blocks, controls: Controls, client: ApiClient, key_of: KeyOf) -> None:
    """The modes and modifiers of the server, and examples."""

    async def models(request: gr.Request) -> tuple[Any, Any]:
        """The modes and modifiers of the server."""
        try:
            found = await client.models(key_of(request))
        except RequestError as error:
            gr.Warning(f"{error}; reload the page in a moment")
            found = []
        kinds = {kind: [AUTO] for kind in ("mode", "modifier")}
        for model in found:
            if model.get("kind") in kinds:
                kinds[model["kind"]].append(model["id"].partition(":")[2].removeprefix("base+"))
        return gr.Dropdown(choices=kinds["mode"]), gr.Dropdown(choices=kinds["modifier"])

    def read(path: str) -> tuple[list[dict[str, str]], Any]:
        """The examples of a file; a file that cannot be read is put away with the reason."""
        try:
            pairs = [{"question": question, "answer": answer} for _, question, answer in read_pairs(Path(path))]
            if not 1 <= len(pairs) <= MAX_EXAMPLES:
                raise CogumiError(f"the file has {len(pairs)} examples; give 1 to {MAX_EXAMPLES}")
        except CogumiError as error:
            gr.Warning(str(error).replace(path, Path(path).name))
            return [], gr.File(value=None, label=EXAMPLES)
        return pairs, gr.File(label=f"Examples in use: {len(pairs)}")

    blocks.load(models, None, [controls.mode, controls.modifier], **QUIET)
    given = [controls.examples, controls.file]
    controls.file.upload(read, controls.file, given, **QUIET)
    controls.file.clear(lambda: ([], gr.File(label=EXAMPLES)), None, given, **QUIET)


def _saving(controls: Controls) -> None:
    """Saving the conversation as a file, which the browser makes."""
    text = gr.Textbox(visible="hidden")
    for button, ending, type, written in (
        (controls.markdown, "md", "text/markdown", lambda kept: _read(kept).markdown()),
        (controls.json, "json", "application/json", lambda kept: _read(kept).model_dump_json(indent=1)),
    ):
        button.click(written, controls.conversation, text, **QUIET).then(
            None, text, None, js=f"(text) => cogumi.save(text, '{ending}', '{type}')"
        )


def _shown(kept: Any) -> Any:
    """The chat with the messages and ratings of a conversation."""
    held = _read(kept)
    return gr.Chatbot(held.rows(), feedback_value=held.ratings)


def _read(kept: Any) -> Conversation:
    """The conversation that a browser sent; an invalid one starts anew."""
    try:
        return Conversation.model_validate(kept or {})
    except ValidationError:
        gr.Warning("the stored conversation cannot be read; a new one begins")
        return Conversation()


def _busy() -> Any:
    return gr.Textbox(value="", submit_btn=False, stop_btn=True)


def _idle(text: str = "") -> Any:
    return gr.Textbox(value=text, submit_btn=True, stop_btn=False)
