"""The cascade: an engine that asks cheap tiers first and estimates P(correct) (see `decide` and `execute`).

`Reply.route` names the route of the answer:
- `base`, `base+draft` (tokens were drafted), `draft`, `modifier`: accepted, so the guarantee covers it;
- `low_confidence`: not accepted; the answer with the highest P(correct), followed by a disclaimer if requested;
- `abstained`: the abstention sentence, because a tier abstained or the request excludes unsure answers (`p_correct` is
  then that of the withheld answer);
- `cache`: an earlier accepted answer.

`Reply.accepted` is true on the routes of the first and the last item. Tokens are streamed as generated if no other tier
can follow and nothing may be withheld; otherwise once the answer is chosen. The reply's text equals the streamed text,
or the text of the last `Revision`. Requests for an adapter, and raw prompts, go directly to that tier and are not
accepted, because the gates were not fitted on them. Requests with their own examples, and all requests if the engines
lack a capability that the gates need (`Cascade.missing`), are answered by the base and never accepted, because they are
not calibrated. The guarantee was measured on greedy answers; it does not cover sampled ones (temperature > 0). `usage`
sums the answers of all tiers, without the draft's reading of the question.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from cogumi.cascade.added_modifiers import add_modifier
from cogumi.cascade.asking import Conversation, Input, Stream, as_request
from cogumi.cascade.decide import usable
from cogumi.cascade.execute import RequestFlow
from cogumi.cascade.memory.personal_offsets import PersonalRouting
from cogumi.cascade.services import Services
from cogumi.cascade.worker_stream import Flow, as_flow, start
from cogumi.confidence.gate import KINDS
from cogumi.confidence.guarantee import Guarantee
from cogumi.core.errors import BusyError, RequestError
from cogumi.core.types import Reading, Reply, Request, Score
from cogumi.engine.protocol import Capabilities, Capability, Engine, Event, Tokenizer, final_reply

NAME = "cogumi"


class Cascade:
    """Services and a pool of `workers` threads, one per request in flight; implements `Engine`.

    `queue` more requests may wait. Raises `RequestError` for an unknown gate.
    """

    def __init__(self, services: Services, *, workers: int = 8, queue: int = 1000) -> None:
        if services.gate not in KINDS:
            raise RequestError(f"unknown gate '{services.gate}': choose one of {', '.join(KINDS)}")
        self.services, self.tiers, self.calibration = services, services.tiers, services.calibration
        self._closed = threading.Event()
        self._capacity = threading.BoundedSemaphore(workers + queue)
        self._admission = threading.Lock()  # no request is admitted while the cascade closes
        self._adding = threading.Lock()  # modifiers are added one at a time
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="cascade")

    @property
    def tokenizer(self) -> Tokenizer:
        """The base's."""
        return self.tiers.base.tokenizer

    @property
    def adapters(self) -> tuple[str, ...]:
        """The modifiers."""
        return self.tiers.base.adapters

    @property
    def context(self) -> int | None:
        """That of the base."""
        return self.tiers.base.context

    @property
    def capabilities(self) -> Capabilities:
        """Those of the base, except capabilities that need a method which the cascade does not have."""
        own = {Capability.SPECULATION, Capability.PREFILL, Capability.RUNTIME_ADAPTERS}
        return self.tiers.base.capabilities - own

    @property
    def missing(self) -> tuple[str, ...]:
        """One line for each feature that this cascade lacks: because of its engines, or because it is not certified."""
        found = self.tiers.missing(self.calibration)
        return found if not self.calibration.guarantees or self.promise.certified else (*found, self.promise.sentence())

    @property
    def promise(self) -> Guarantee:
        """The calibrated guarantee for the tiers of the default mode. Raises `BundleError` if there is none."""
        mode = self.services.settings.mode(self.services.settings.default)
        has_draft, has_modifiers = self.tiers.has_draft, bool(self.tiers.modifiers)
        return self.calibration.promise(usable(mode, has_draft, has_modifiers, self.calibration).policy)

    @property
    def models(self) -> dict[str, str]:
        """Every model name with its kind: `cascade`, `mode`, `tier` or `modifier`; see `resolve`."""
        kinds = dict.fromkeys(self.services.settings.names, "mode")
        kinds |= dict.fromkeys(("base", "draft") if self.tiers.has_draft else ("base",), "tier")
        kinds |= {f"base+{name}": "modifier" for name in self.adapters}
        return {NAME: "cascade"} | {f"{NAME}:{tail}": kind for tail, kind in kinds.items()}

    @property
    def takes_feedback(self) -> bool:
        """Whether answers can be rated, which needs a state folder."""
        return self.services.history.memory is not None

    def resolve(self, model: str, request: Request) -> tuple[Engine, Request]:
        """The engine of a model name, and the request adapted to it. Raises `RequestError` for an unknown name."""
        if model not in self.models:
            raise RequestError(f"unknown model '{model}': choose one of {', '.join(self.models)}")
        tail = model.removeprefix(NAME).removeprefix(":")
        if tail in self.services.settings.names:
            return self, replace(request, mode=tail)
        if tail == "draft":
            return self.tiers.draft, request
        if tail.startswith("base"):
            return self.tiers.base, replace(request, adapter=tail.partition("+")[2] or request.adapter)
        return self, request

    def ask(self, question: Input | Request, **options: Any) -> Reply:
        """Answer a question; `options` are fields of `Request` (see `asking.as_request`)."""
        return final_reply(self.generate(as_request(question, options)))

    def stream(self, question: Input | Request, **options: Any) -> Stream:
        """Answer a question piece by piece; options as for `ask`."""
        return Stream(self.generate(as_request(question, options)))

    def chat(self, **options: Any) -> Conversation:
        """Start a conversation; `options` apply to every question."""
        return Conversation(self, **options)

    def score(self, request: Input | Request, answer: str) -> Score:
        """Score an answer by the base, or by the request's adapter."""
        self._check_open()
        return self.tiers.base.score(as_request(request, {}), answer)

    def read(self, request: Request) -> Reading:
        """Read a prompt by the base."""
        self._check_open()
        return self.tiers.base.read(request)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts by the base."""
        self._check_open()
        return self.tiers.base.embed(texts)

    def generate(self, request: Request) -> Iterator[Event]:
        """Submit a request and return its events; the module docstring says when tokens are streamed."""
        self.services.settings.check(request.mode)
        direct = request.adapter is not None or request.prompt is not None
        flow = self._direct(request) if direct else RequestFlow(self.services, request).run()
        with self._admission:
            self.check(request)
            if not self._capacity.acquire(blocking=False):
                raise BusyError("too many requests are waiting already; try again in a moment")
            return start(flow, self._pool, self._closed.is_set, self._capacity.release)

    def check(self, request: Request) -> None:
        """Raise the base's errors about an invalid request at once, before it waits for a worker."""
        self._check_open()
        self.tiers.base.check(request)

    def feedback(self, id: str, right: bool, user: str | None = None) -> None:
        """Record whether the answer `id` was right. Raises `RequestError` if this user has no such answer."""
        self._check_open()
        self.services.history.rate(id, user or "", right)

    def personal(self, user: str, on: bool | None = None) -> PersonalRouting:
        """Switch a user's personal routing on or off (None: no change) and return its state.

        Raises `RequestError` without a user or without a state folder.
        """
        self._check_open()
        return self.services.history.personal(user, on)

    def forget(self, user: str) -> int:
        """Delete the questions, answers and ratings of a user; returns the number of deleted turns.

        Raises `RequestError` without a state folder.
        """
        self._check_open()
        return self.services.history.forget(user)

    def add_modifier(self, name: str, path: str | Path) -> None:
        """Make a modifier (a GGUF file trained on this base) available as `name`, also while requests run.

        It answers requests with `adapter=name`; its answers are never accepted. With a state folder it is added again
        after a restart. Raises `RequestError` for a name in use, `BundleError` for a modifier of another base.
        """
        self._check_open()
        with self._adding:
            add_modifier(self.tiers.base, name, Path(path), self.services.added)

    def close(self) -> None:
        """Cancel running and waiting requests, then free the models and close the files."""
        with self._admission:
            self._closed.set()
        self._pool.shutdown(wait=True)
        self.services.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise RequestError("this cascade is closed: open it again")

    def _direct(self, request: Request) -> Flow:
        tier = f"modifier:{request.adapter}" if request.adapter else "base"
        reply = yield from as_flow(self.tiers.answer(request, request.adapter or "base"), live=True)
        return replace(reply, tier=tier, route=tier.partition(":")[0], id=request.id or "")
