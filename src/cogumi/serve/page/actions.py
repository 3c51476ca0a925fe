"""What the controls of the page do (SPEC G2). The server keeps nothing of a conversation; see `conversations`."""

from __future__ import annotations

import time
import uuid
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
GIVEN = QUIET | {"js": "cogumi.given"}
"""Options of events whose first input is the conversation, which the browser holds."""
_CHAT = gr.Chatbot(render=False)
"""Converts messages to what Gradio's code in the browser reads."""
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
    """Connect the controls with the API behind `client`.

    The browser holds the conversation (`page.js`). Functions of the server write into `controls.view` only, and the
    browser shows a view if it is one of the current conversation, so that what comes late writes into no other one.
    """
    shown = [controls.question, controls.chat, controls.history]
    controls.view.change(None, controls.view, shown, js="cogumi.show")
    sent = _sending(controls, client, key_of, shown)
    _rating(controls, client, key_of)
    _conversations(controls, shown, sent)
    blocks.load(None, None, controls.sidebar, js="cogumi.roomy")
    loaded = _settings(blocks, controls, client, key_of)
    loaded.then(None, None, shown, js="cogumi.fresh")  # now the question box can be used
    _saving(controls)


def _sending(controls: Controls, client: ApiClient, key_of: KeyOf, shown: list[Any]) -> Dependency:
    """Sending, streaming and stopping; returns the event that sends."""

    async def send(request: gr.Request, kept: Any, asked: str, *values: Any) -> AsyncGenerator[dict[str, Any]]:
        """Stream the answer; if there is none, the question returns to its box."""
        settings, held, run = Settings(*values), _read(kept), _run()
        if not asked.strip():
            return
        answer = Turn(role="assistant", content="")
        whole = held.model_copy(update={"turns": [*held.turns, Turn(role="user", content=asked), answer]})
        yield _view(whole, run, box="", busy=True)
        told = time.monotonic()
        try:
            async for piece in client.answer(key_of(request), settings.body(whole)):
                answer.id, answer.content = piece.id, answer.content + piece.text
                if piece.cogumi is not None:
                    answer.cogumi = read_extension(piece.cogumi | {"signals": {}})  # not shown, and many
                elif time.monotonic() - told >= EVERY:
                    yield _view(whole, run, busy=True)
                    told = time.monotonic()
        except RequestError as error:
            gr.Warning(str(error), duration=20)
            if not answer.content:
                yield _view(held, run, box=asked)
                return
        yield _view(whole, run)

    given = [controls.conversation, controls.question, *controls.settings]
    sent = controls.question.submit(send, given, controls.view, concurrency_limit=None, trigger_mode="once", **GIVEN)
    controls.question.stop(None, None, shown, js="cogumi.stop", cancels=[sent])
    return sent


def _rating(controls: Controls, client: ApiClient, key_of: KeyOf) -> None:
    """Thumbs. The conversation may go on while one is on its way: the browser changes only the rated turn."""

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
        return {"id": held.id, "turn": at, "right": found.liked}, gr.skip()

    rating = gr.JSON(visible="hidden")
    controls.chat.like(rate, controls.conversation, [rating, controls.chat], **GIVEN).then(
        None, rating, controls.history, js="cogumi.rated"
    )


def _conversations(controls: Controls, shown: list[Any], sent: Dependency) -> None:
    """New, old and forgotten conversations; a running answer ends, and what there is of it is kept."""
    controls.reasons.input(None, controls.reasons, None, js="cogumi.explain")
    for on in (controls.new.click, controls.chat.clear):
        on(None, None, shown, js="cogumi.fresh", cancels=[sent])
    controls.forget.click(None, None, shown, js="cogumi.forget", cancels=[sent])
    controls.history.input(None, controls.history, shown, js="cogumi.open", cancels=[sent]).then(
        lambda kept: _view(_read(kept), _run()), controls.conversation, controls.view, **GIVEN
    )


def _settings(blocks: gr.Blocks, controls: Controls, client: ApiClient, key_of: KeyOf) -> Dependency:
    """The modes and modifiers of the server, and examples; returns the event that loads the former."""

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

    loaded = blocks.load(models, None, [controls.mode, controls.modifier], **QUIET)
    given = [controls.examples, controls.file]
    controls.file.upload(read, controls.file, given, **QUIET)
    controls.file.clear(lambda: ([], gr.File(label=EXAMPLES)), None, given, **QUIET)
    return loaded


def _saving(controls: Controls) -> None:
    """Saving the conversation as a file, which the browser makes."""
    text = gr.Textbox(visible="hidden")
    for button, ending, type, written in (
        (controls.markdown, "md", "text/markdown", lambda kept: _read(kept).markdown()),
        (controls.json, "json", "application/json", lambda kept: _read(kept).model_dump_json(indent=1)),
    ):
        button.click(written, controls.conversation, text, **GIVEN).then(
            None, text, None, js=f"(text) => cogumi.save(text, '{ending}', '{type}')"
        )


def _view(held: Conversation, run: str, *, box: str | None = None, busy: bool = False) -> dict[str, Any]:
    """What the browser shows: a conversation, its messages, the question box (None: as it is).

    `run` tells answers apart, and the same conversation opened twice. While the answer is not complete, the box has a
    button to stop it.
    """
    return {
        "conversation": held.model_dump(mode="json"),
        "messages": _CHAT.postprocess(held.rows()).model_dump(),
        "ratings": held.ratings,
        "run": run,
        "box": box,
        "busy": busy,
    }


def _run() -> str:
    return uuid.uuid4().hex


def _read(kept: Any) -> Conversation:
    """The conversation that a browser sent; an invalid one starts anew."""
    try:
        return Conversation.model_validate(kept or {})
    except ValidationError:
        gr.Warning("the stored conversation cannot be read; a new one begins")
        known = kept if isinstance(kept, dict) else {}
        return Conversation(id=str(known.get("id", "")), user=str(known.get("user", "")))
