"""A server with the page on it, over a scripted engine."""

import contextlib
from dataclasses import replace

from fastapi import FastAPI

from cogumi.core.errors import RequestError
from cogumi.core.types import Reply
from cogumi.serve.app import PAGE, bind, create_app
from cogumi.serve.page.mounting import mount_page
from support.serve import Scripted, serving


class RatedScripted(Scripted):
    """Stands by its answers, and keeps the ratings that it is sent."""

    def __init__(self):
        super().__init__()
        self.rated = []

    def _events(self, word, rest, request):
        with contextlib.closing(super()._events(word, rest, request)) as events:
            for event in events:
                yield replace(event, accepted=True) if isinstance(event, Reply) else event

    def feedback(self, id, right, user=None):
        if id == "unknown":
            raise RequestError("there is no such answer")
        self.rated.append((id, right, user))


@contextlib.contextmanager
def paged(load=RatedScripted, *, prefix="", keys=None, port=0):
    """Serve an engine with its page, below `prefix`; yields the port."""
    listener = bind("127.0.0.1", port)
    port = listener.getsockname()[1]
    app = create_app(load, keys=keys, own_login=[PAGE])
    mount_page(app, PAGE, f"http://127.0.0.1:{port}{prefix}", keys=keys)
    if prefix:
        outer = FastAPI()
        outer.mount(prefix, app)
        app = outer
    with serving(app, listener):
        yield port
