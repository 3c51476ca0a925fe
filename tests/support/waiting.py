"""Wait for events of other threads and processes, never for a fixed time."""

import threading
import time

from cogumi.engine.llama.binding.context import Context

PATIENCE = 120.0
"""Seconds after which a wait fails. The limit only keeps a broken test from hanging."""


def until(condition):
    """Wait until `condition()` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"the condition did not hold within {PATIENCE:.0f} s"
        time.sleep(0.005)


class Gate:
    """Holds forward passes of llama.cpp, so that a test decides what is under way at a given moment.

    It starts open. `reached` is set while a pass waits at the closed gate.
    """

    def __init__(self, monkeypatch):
        self.reached, self._changed = threading.Event(), threading.Condition()
        self._left, self._engine = None, None
        decode = Context.decode

        def held(context, rows, **options):
            self._pass()
            return decode(context, rows, **options)

        monkeypatch.setattr(Context, "decode", held)

    def shut(self, *, after=0, engine=None):
        """Let `after` more passes through and hold the next; those of one llama engine if it is given, else of all."""
        self.reached.clear()
        self._set(after, engine)

    def wait(self):
        """Wait until a pass is held."""
        assert self.reached.wait(PATIENCE)

    def open(self):
        """Let all passes through."""
        self._set(None, None)

    def _set(self, left, engine):
        with self._changed:
            self._left, self._engine = left, engine
            self._changed.notify_all()

    def _pass(self):
        with self._changed:
            if self._engine and threading.current_thread() is not self._engine._scheduler._thread:
                return
            if self._left == 0:
                self.reached.set()
            assert self._changed.wait_for(lambda: self._left != 0, PATIENCE)
            if self._left:
                self._left -= 1
