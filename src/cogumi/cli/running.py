"""Commands that run a bundle or change its state folder: `chat`, `serve`, `personal`, `forget`."""

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
    HostOption,
    JsonOption,
    KeysOption,
    ModeOption,
    ModifiersOption,
    PortOption,
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
    once: Annotated[str | None, typer.Option(help="Answer this question and exit.")] = None,
    why: Annotated[bool, typer.Option("--why", help="With --once: show every decision below the answer.")] = False,
    examples: Annotated[
        Path | None, typer.Option(help='Few-shot examples: JSONL with "question" and "answer" on each line.')
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
    """Chat with a bundle; below each answer: whether it is sure, its tier and P(correct). /why shows every decision.

    Example: `cogumi chat runs/smollm2/bundle --once "What is the capital of France?"`
    """
    from cogumi.cascade.modes import load_settings
    from cogumi.cli.chat import USER, answer, chat_loop, load_examples, topics

    if json and once is None:
        raise CogumiError('--json prints a single answer: give the question with --once "..."')
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
            files = cascade.services.files
            title = files.bundle.description.get("title", "") if files else ""
            chat_loop(
                conversation, chosen, title, topics(cascade.tiers.heads.router.classes if cascade.tiers.heads else ())
            )
        elif json:
            from cogumi.engine.reply_extension import extension

            reply = conversation.ask(once)
            console.print_json(
                {"question": once, "answer": reply.text, "finish_reason": reply.finish_reason} | extension(reply)
            )
        else:
            reply = answer(conversation, once)
            console.print_reasons(reply) if why else console.print_verdict(reply)


def serve(
    bundle: BundleArgument = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    slots: Annotated[int, typer.Option(min=1, help="Number of requests answered at the same time.")] = 8,
    context: Annotated[
        int | None,
        typer.Option(
            min=32,
            help="Maximum tokens per request, prompt and answer.",
            show_default="those the model was trained for, at most 4096",
        ),
    ] = None,
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
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Another host name to answer for; may be repeated. On 127.0.0.1 a foreign name in a request's Host "
            "header is refused, because web pages could use it to reach the server.",
            metavar="NAME",
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin whose pages may call the server (http://localhost:3000), or * for all; may be repeated.",
            metavar="ORIGIN",
            show_default="none",
        ),
    ] = None,
    grace: Annotated[
        float, typer.Option(min=0, help="Seconds that running answers get after Ctrl-C or SIGTERM.")
    ] = 10.0,
    keys: KeysOption = None,
    open_: Annotated[
        bool, typer.Option("--open", help="Serve other machines without keys: everybody who reaches the port may ask.")
    ] = False,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM file of a TLS certificate, to serve HTTPS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's private key.")] = None,
    root_path: Annotated[
        str,
        typer.Option(help="Prefix below which a proxy serves this server (/llm), if it removes it.", metavar="PATH"),
    ] = "",
    page: Annotated[bool, typer.Option("--ui", help="Serve the page at /ui too (`cogumi ui`).")] = False,
    json: JsonOption = False,
) -> None:
    """Serve a bundle to OpenAI clients at http://HOST:PORT/v1.

    Example: `cogumi serve runs/smollm2/bundle --port 8000`
    """
    from cogumi.cascade.modes import load_settings
    from cogumi.serve import app
    from cogumi.serve.api_keys import KeyFile

    folder, chosen = chosen_bundle(bundle), load_settings(settings)
    if modifiers is not None and not modifiers.is_dir():
        raise CogumiError(f"{modifiers} is not a folder; create it, or name the folder of the modifier files")
    if (tls_certificate is None) != (tls_key is None):
        raise CogumiError("HTTPS needs both --tls-certificate and --tls-key")
    certificate = (tls_certificate, tls_key) if tls_certificate and tls_key else None
    known = KeyFile(keys) if keys else None
    if known:
        known.listed()  # a missing or damaged file ends the command here
    engines, memory = chosen_engines(base_url, base_model), parse_bytes(adapter_memory) if adapter_memory else None
    listener = app.bind(host, port)
    if not (keys or open_ or app.is_loopback(listener)):
        listener.close()
        raise CogumiError(f"other machines can reach {host}: give --keys FILE, or --open to serve everybody")
    where = f"{'https' if certificate else 'http'}://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    console.STDERR.print(f"cogumi: loading {folder}", soft_wrap=True)

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
            found = {"url": f"{where}/v1", "bundle": str(folder), "models": list(engine.models)}
            console.print_json(found | ({"page": f"{where}{app.PAGE}"} if page else {}))
        else:
            console.print_serving(where, engine.models, f"{where}{app.PAGE}" if page else None)

    app.serve(
        load,
        listener,
        ready,
        modifiers,
        allowed_hosts=allow_host or (),
        origins=cors or (),
        grace=grace,
        keys=known,
        certificate=certificate,
        page=page,
        root_path=root_path,
    )


def ui(
    bundle: BundleArgument = None,
    host: HostOption = "127.0.0.1",
    port: PortOption = 8000,
    threads: ThreadsOption = None,
    settings: SettingsOption = None,
    state: StateOption = None,
    keys: KeysOption = None,
    json: JsonOption = False,
) -> None:
    """Open a page to chat with a bundle in a browser, at http://HOST:PORT/ui; the API is served beside it.

    It is `cogumi serve --ui`, which has more options. With --state the thumbs below an answer are stored as ratings.
    Example: `cogumi ui runs/smollm2/bundle --state state`
    """
    serve(bundle, host, port, threads=threads, settings=settings, state=state, keys=keys, page=True, json=json)


def personal(
    user: Annotated[str, typer.Argument(help="User id as in requests; `local` for `cogumi chat`.")],
    state: Annotated[Path, typer.Option(help="State folder of `chat` or `serve`.")],
    on: Annotated[bool | None, typer.Option("--on/--off", help="Switch it on or off.", show_default="show it")] = None,
    json: JsonOption = False,
) -> None:
    """Show or switch personal routing: a user's ratings adjust P(correct) for that user. Off by default.

    A running server applies the change within a minute. Example: `cogumi personal alice --on --state state`
    """
    from cogumi.cascade.memory.learned_file import LearnedFile
    from cogumi.cascade.memory.personal_offsets import PersonalOffsets

    with closing(_memory(state)) as memory:
        if on is not None:
            memory.set_personal(user, on)
        learned = LearnedFile(state)
        learned.refresh()
        found = PersonalOffsets(memory).describe(user, learned.state.layer)
    if json:
        console.print_json(asdict(found))
    else:
        console.print_personal(found)


def forget(
    user: Annotated[str, typer.Argument(help="User id as in requests; `local` for `cogumi chat`.")],
    state: Annotated[Path, typer.Option(help="State folder of `chat` or `serve`.")],
) -> None:
    """Delete the stored data of a user: questions, answers, ratings.

    Example: `cogumi forget alice --state state`
    """
    with closing(_memory(state)) as memory:
        console.STDOUT.print(f"{memory.forget(user)} turns of {user} deleted")


def _memory(state: Path) -> Memory:
    """Open the memory in a state folder. Raises `CogumiError` if there is none."""
    from cogumi.cascade.memory.turns import FILE, Memory

    if not (state / FILE).is_file():
        raise CogumiError(f"{state} holds no memory; name the --state folder of `chat` or `serve`")
    return Memory(state / FILE)


def _opened(folder: Path, **options: Any) -> Cascade:
    """Open a bundle with options of `open_cascade`: show unpacking progress, print missing capabilities."""
    from cogumi.cascade.opening import open_cascade

    with ByteProgress(f"unpacking {folder}") as bar:
        cascade = open_cascade(folder, progress=bar.advanced, **options)
    for line in cascade.missing:
        console.STDERR.print(f"cogumi: {line}", soft_wrap=True, markup=False)
    return cascade
