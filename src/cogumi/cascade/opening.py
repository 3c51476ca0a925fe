"""Opens a bundle as a cascade, with the data kept between runs."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cache as once
from functools import partial
from pathlib import Path

from cogumi.bundle.format import INDEX, Bundle
from cogumi.bundle.packed import Progress, is_packed, no_progress
from cogumi.bundle.unpack import BundleFiles
from cogumi.cascade import added_modifiers
from cogumi.cascade.bare_model import bare_model, open_model
from cogumi.cascade.cascade import Cascade
from cogumi.cascade.dissatisfaction import Escalation
from cogumi.cascade.engines import EngineFactory, EngineOptions, Engines, llama_engines
from cogumi.cascade.history import History
from cogumi.cascade.memory.answer_cache import AnswerCache
from cogumi.cascade.memory.learner import Learner
from cogumi.cascade.memory.reuse_check import read_check
from cogumi.cascade.memory.turns import FILE, Memory
from cogumi.cascade.modes import Settings
from cogumi.cascade.self_critique import Critic
from cogumi.cascade.services import Services
from cogumi.cascade.template_bank import Pair, Templates
from cogumi.cascade.tiers import Heads, Tiers
from cogumi.confidence.gate import KINDS, Calibration
from cogumi.confidence.nets import load_head, load_net, load_scope
from cogumi.core.errors import BundleError, CogumiError
from cogumi.core.model_files import GGUF, locate_model
from cogumi.core.packages import installed, load
from cogumi.engine.embedder import MODEL, TOKENIZER, Embedder
from cogumi.engine.few_shot import read_pairs
from cogumi.engine.protocol import Engine

REUSE_MODES = ("exact", "static", "verified")
"""Ways to reuse answers: for the same question; also for similar ones; for similar ones verified by comparisons."""

ONNX_PACKAGES = ("onnxruntime", "tokenizers")
"""Packages needed by the follow-up classifier and the sentence encoder."""
SEARCH_PACKAGES = ("faiss",)
"""Packages needed to search similar questions."""


def open_cascade(
    folder: str | Path,
    *,
    slots: int = 8,
    context: int | None = None,
    threads: int | None = None,
    cache: str | None = None,
    gate: str = KINDS[0],
    settings: Settings | None = None,
    state: str | Path | None = None,
    reuse: str | None = None,
    reuse_check: str | Path | None = None,
    repack: bool = True,
    adapter_memory: int | None = None,
    unpack: str | None = None,
    progress: Progress = no_progress,
    engines: EngineFactory = llama_engines,
) -> Cascade:
    """Open and verify a bundle as a cascade; or a GGUF file, a Hugging Face folder or `smollm2`, without calibration.

    `slots`, `context`, `threads`, `cache`, `repack` and `adapter_memory` are passed to the engines (see
    `EngineOptions`). `engines` is the factory of the engines; it may replace the base, for example by a model on a
    server (`engines.remote_base`); `Cascade.missing` lists the features lost. `state`: folder for session memory,
    learned corrections, added modifiers and cached answers (None: nothing is kept between runs). `reuse`: reuse answers
    (one of `REUSE_MODES`; without `state`, in memory); `reuse_check`: file of a second check of similar questions (see
    suite `cache`). `unpack` and `progress`: mode and progress of unpacking (see `bundle.unpack.BundleFiles`). Parts
    whose optional packages are not installed are skipped with a warning. Raises `BundleError` for an invalid bundle.
    """
    model, folder, state = bare_model(folder), Path(folder), Path(state) if state else None
    options = EngineOptions(slots, context, threads, cache, repack, adapter_memory)
    if model is not None:
        if reuse is not None or engines is not llama_engines:
            what = "reuse answers" if reuse is not None else "replace the base"
            raise CogumiError(f"{model} is a model without calibration; to {what}, name a bundle")
        return open_model(model, options, settings or Settings(), state)
    if not folder.is_dir():
        what = "is neither a bundle nor a GGUF file" if folder.exists() else "does not exist"
        raise BundleError(f"{folder} {what}: name a bundle, a GGUF file or a model folder, or build one: cogumi build")
    if (folder / "bundle" / INDEX).is_file():
        raise BundleError(f"{folder} is the folder of a build; name its bundle: {folder / 'bundle'}")
    if any(folder.glob(f"*{GGUF}")) and not ((folder / INDEX).is_file() or is_packed(folder)):
        locate_model(str(folder), Path())  # says which file to name
    with ExitStack() as opened:
        files = BundleFiles(folder, unpack, progress)
        opened.callback(files.close)
        bundle = _runnable(files.bundle)
        calibration = Calibration.from_json(bundle.calibration)
        embedder = once(partial(_embedder, files, bundle.embedder)) if bundle.embedder else None
        answers = _open_answers(bundle, embedder, reuse, Path(reuse_check) if reuse_check else None, state)
        history = _history(bundle, calibration, answers, state, gate, opened)
        tiers = _tiers(bundle, engines(files, options), opened)
        services = Services(
            tiers,
            calibration,
            settings=_settings(settings or Settings(), bundle),
            gate=gate,
            history=history,
            escalation=Escalation(bundle.escalation) if bundle.escalation else None,
            critic=Critic(bundle.critic) if bundle.critic else None,
            templates=Templates(_examples(bundle.examples), embedder) if bundle.examples else None,
            system=str(bundle.description.get("system", "")),
            systems=frozenset(known) if (known := bundle.description.get("systems")) else None,
            files=files,
            added=_restore_modifiers(tiers.base, state),
        )
        cascade = Cascade(services, workers=slots)
        opened.pop_all()
    return cascade


def _settings(settings: Settings, bundle: Bundle) -> Settings:
    """The operator's settings; their default mode is that of the bundle unless they set another."""
    mode = bundle.description.get("mode", settings.default)
    if mode not in settings.names:
        raise BundleError(f"the bundle's default mode '{mode}' is unknown to this version; known: {settings.names}")
    chosen = "default" in settings.model_fields_set
    return settings if chosen else settings.model_copy(update={"default": mode})


def _runnable(bundle: Bundle) -> Bundle:
    """Remove the nets that need ONNX Runtime if it is not installed; a warning names the features that are off."""
    if installed(*ONNX_PACKAGES) or not (bundle.escalation or bundle.embedder):
        return bundle
    off = "complaints are not recognised and examples are chosen by domain only"
    warnings.warn(f"onnxruntime is not installed, so {off}; install it: pip install 'cogumi[onnx]'", stacklevel=3)
    return replace(bundle, escalation=None, embedder=None)


def _embedder(files: BundleFiles, folder: Path) -> Embedder:
    """Open the sentence encoder, which takes longer than the rest of a cascade together."""
    for name in (MODEL, TOKENIZER):
        files.file(folder / name)
    return Embedder(folder)


def _tiers(bundle: Bundle, engines: Engines, opened: ExitStack) -> Tiers:
    """Combine the engines with their heads; `opened` closes them. Without a draft, the base reads questions."""
    base, draft = engines
    for engine in (draft, base):
        if engine is not None:
            opened.callback(engine.close)
    difficulty, router = load_head(bundle.difficulty), load_net(bundle.router)
    if len(router.mean) != 2 * len(difficulty.mean):
        raise BundleError(
            f"{bundle.path}: router and difficulty head belong to different models; build the bundle again"
        )
    heads = Heads(difficulty, router, load_scope(bundle.router))
    return Tiers(base, draft or base, heads, frozenset(bundle.modifiers))


def _history(
    bundle: Bundle,
    calibration: Calibration,
    answers: AnswerCache | None,
    state: Path | None,
    gate: str,
    opened: ExitStack,
) -> History:
    """Open the data about earlier requests; `opened` closes it."""
    if answers is not None:
        opened.callback(answers.close)
    memory = Memory(state / FILE) if state else None
    if memory:
        opened.callback(memory.close)
    learner = Learner(memory, state, list(calibration.guarantees.values())) if memory and state else None
    return History(memory, learner, answers, model=bundle.fingerprint, gate=gate)


def _open_answers(
    bundle: Bundle,
    embedder: Callable[[], Embedder] | None,
    reuse: str | None,
    check: Path | None,
    state: Path | None,
) -> AnswerCache | None:
    """Open the answer cache; None if `reuse` is None.

    Raises `CogumiError` for an unknown `reuse`, or one that needs missing parts of the bundle or missing packages.
    """
    if check and reuse in (None, "exact"):
        raise CogumiError("a reuse check applies to similar questions: add --reuse static or --reuse verified")
    if reuse is None:
        return None
    if reuse not in REUSE_MODES:
        raise CogumiError(f"unknown value '{reuse}' of reuse: choose one of {', '.join(REUSE_MODES)}")
    for module in (*SEARCH_PACKAGES, *ONNX_PACKAGES) if reuse != "exact" else ():
        load(module, f"--reuse {reuse}")
    if reuse != "exact" and embedder is None:
        raise CogumiError(f"{bundle.path} has no embedder: use --reuse exact")
    encoder = embedder() if embedder and reuse != "exact" else None
    net = read_check(check, encoder.identity) if encoder and check else None
    return AnswerCache(encoder, state / "answers" if state else None, check=net, verified=reuse == "verified")


def _restore_modifiers(base: Engine, state: Path | None) -> Path | None:
    """Restore added modifiers and return the path of their list; None without a state folder."""
    if state is None:
        return None
    added_modifiers.restore_modifiers(base, state / added_modifiers.FILE)
    return state / added_modifiers.FILE


def _examples(path: Path) -> dict[str, list[Pair]]:
    """Read the examples of a bundle by domain. Raises `BundleError` for an invalid line."""
    found: dict[str, list[Pair]] = defaultdict(list)
    try:
        for domain, question, answer in read_pairs(path):
            found[domain].append((question, answer))
    except CogumiError as error:
        raise BundleError(f"{error}; build the bundle again") from error
    return found
