"""Commands that run a bundle: `chat`, `serve`, `forget`."""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cogumi.cli import console
from cogumi.cli.options import (
    AdapterMemoryOption,
    BaseModelOption,
    BaseUrlOption,
    BundleArgument,
    CacheOption,
    JsonOption,
    ModeOption,
    ModifiersOption,
    RepackOption,
    ReuseCheckOption,
    ReuseOption,
    SettingsOption,
    StateOption,
    ThreadsOption,
    UnpackOption,
    chosen_bundle,
    chosen_engines,
)
from cogumi.cli.progress import ByteProgress
from cogumi.core.amounts import parse_bytes
from cogumi.core.errors import CogumiError

if TYPE_CHECKING:
    from cogumi.cascade.cascade import Cascade
    from cogumi.cascade.memory.turns import Memory
    from cogumi.serve.engine_host import ServedEngine


def chat(
    bundle: BundleArgument = None,
    mode: ModeOption = None,
    once: Annotated[str | None, typer.Option(help="Answer this one question and end.")] = None,
    examples: Annotated[
        Path | None, typer.Option(help='Worked examples to answer after: a JSON line {"question", "answer"} for each.')
    ] = None,
    settings: SettingsOption = None,
    state: StateOption = None,
    threads: ThreadsOption = None,
    repack: RepackOption = True,
    unpack: UnpackOption = None,
    adapter_memory: AdapterMemoryOption = None,
    base_url: BaseUrlOption = None,
    base_model: BaseModelOption = None,
    json: JsonOption = False,
) -> None:
    """Talk to a bundle; under each answer stand the tier that gave it, P(correct) and why.

    Example: `cogumi chat runs/tiny/bundle --once "What is 3 + 4?"`
    """
    from cogumi.cascade.modes import load_settings
    from cogumi.cli.chat import USER, answer, load_examples, talk

    if json and once is None:
        raise CogumiError('--json prints one answer: give its question with --once "..."')
    chosen = load_settings(settings)
    chosen.check(mode)
    shown = load_examples(examples) if examples else ()
    opened = _opened(
        chosen_bundle(bundle),
        threads=threads,
        repack=repack,
        settings=chosen,
        state=state,
        unpack=unpack,
        adapter_memory=parse_bytes(adapter_memory) if adapter_memory else None,
        engines=chosen_engines(base_url, base_model),
    )
    with closing(opened) as cascade:
        conversation = cascade.chat(mode=mode, user=USER, examples=shown)
        if once is None:
            talk(conversation, chosen)
        elif json:
            from cogumi.engine.reply_extension import extension

            reply = conversation.ask(once)
            console.emit(
                {"question": once, "answer": reply.text, "finish_reason": reply.finish_reason} | extension(reply)
            )
        else:
            console.print_reasons(answer(conversation, once))


def serve(
    bundle: BundleArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens it to the network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Requests answered at the same time.")] = 8,
    context: Annotated[int, typer.Option(min=32, help="Tokens of prompt and answer together, per request.")] = 512,
    threads: ThreadsOption = None,
    repack: RepackOption = True,
    unpack: UnpackOption = None,
    cache: CacheOption = None,
    settings: SettingsOption = None,
    state: StateOption = None,
    reuse: ReuseOption = None,
    reuse_check: ReuseCheckOption = None,
    adapter_memory: AdapterMemoryOption = None,
    modifiers: ModifiersOption = None,
    base_url: BaseUrlOption = None,
    base_model: BaseModelOption = None,
    json: JsonOption = False,
) -> None:
    """Serve a bundle to any OpenAI client, at http://HOST:PORT/v1; any API key is accepted.

    Example: `cogumi serve runs/tiny/bundle --port 8000`
    """
    from cogumi.cascade.modes import load_settings
    from cogumi.serve import app

    folder, chosen = chosen_bundle(bundle), load_settings(settings)
    if modifiers is not None and not modifiers.is_dir():
        raise CogumiError(f"{modifiers} is no folder; make it, or name the one that modifiers are added from")
    engines, memory = chosen_engines(base_url, base_model), parse_bytes(adapter_memory) if adapter_memory else None
    listener = app.bind(host, port)
    where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    console.NOTES.print(f"cogumi: loading {folder}", soft_wrap=True)

    load = partial(
        _opened,
        folder,
        slots=slots,
        context=context,
        threads=threads,
        cache=cache,
        settings=chosen,
        state=state,
        reuse=reuse,
        reuse_check=reuse_check,
        adapter_memory=memory,
        engines=engines,
        repack=repack,
        unpack=unpack,
    )

    def ready(engine: ServedEngine) -> None:
        if json:
            console.emit({"url": f"{where}/v1", "bundle": str(folder), "models": list(engine.models)})
        else:
            console.print_serving(where, engine.models)

    app.serve(load, listener, ready, modifiers)


def personal(
    user: Annotated[str, typer.Argument(help="The user as requests name them; `local` is the terminal's.")],
    state: Annotated[Path, typer.Option(help="The folder that --state named.")],
    on: Annotated[bool | None, typer.Option("--on/--off", help="Switch it.", show_default="show it only")] = None,
    json: JsonOption = False,
) -> None:
    """Personal routing: a user's own ratings change how sure answers are for them. Off unless they ask for it.

    A server that is running follows within a minute. Example: `cogumi personal alice --on --state state`
    """
    from cogumi.cascade.memory.learned_file import LearnedFile
    from cogumi.cascade.memory.personal_offsets import PersonalOffsets

    with closing(_memory(state)) as memory:
        if on is not None:
            memory.choose_personal(user, on)
        learned = LearnedFile(state)
        learned.refresh()
        found = PersonalOffsets(memory).describe(user, learned.state.layer)
    if json:
        console.emit(asdict(found))
    else:
        console.print_personal(found)


def forget(
    user: Annotated[str, typer.Argument(help="The user as requests name them; `local` is the terminal's.")],
    state: Annotated[Path, typer.Option(help="The folder that --state named.")],
) -> None:
    """Delete what is remembered of a user: questions, answers, ratings.

    Example: `cogumi forget alice --state state`
    """
    with closing(_memory(state)) as memory:
        console.OUT.print(f"{memory.forget(user)} turns of {user} deleted")


def _memory(state: Path) -> Memory:
    """The memory in a state folder. Raises `CogumiError` if there is none."""
    from cogumi.cascade.memory.turns import FILE, Memory

    if not (state / FILE).is_file():
        raise CogumiError(f"{state} holds no memory; name the folder that was given with --state")
    return Memory(state / FILE)


def _opened(folder: Path, **options: Any) -> Cascade:
    """A bundle as a cascade with these options of `open_cascade`, a bar while it is unpacked, and what it lacks."""
    from cogumi.cascade.opening import open_cascade

    with ByteProgress(f"unpacking {folder}") as bar:
        cascade = open_cascade(folder, progress=bar.advanced, **options)
    for line in cascade.missing:
        console.NOTES.print(f"cogumi: {line}", soft_wrap=True, markup=False)
    return cascade
