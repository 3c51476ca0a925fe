"""A scripted engine behind the HTTP server, and the `openai` package as its client."""

import pytest

from support.serve import Scripted, client_of, ready


@pytest.fixture(scope="module")
def engine():
    return Scripted()


@pytest.fixture(scope="module")
def port(engine):
    with ready(lambda: engine, keep_alive_seconds=0.2, max_body_bytes=20_000) as port:
        yield port
    assert engine.closed


@pytest.fixture(scope="module")
def client(port):
    return client_of(port)
