"""The hook for finished answers: each choice of each request arrives exactly once, however it ends."""

import json
import logging
import threading

import openai
import pytest

from cogumi.core.errors import BusyError, ContextError
from cogumi.core.types import Reply, Usage
from cogumi.engine.events import Events
from support.serve import Scripted, client_of, raw, running, send_and_hang_up
from support.waiting import PATIENCE, until


class RecordingHook:
    """A hook that records its answers."""

    def __init__(self):
        self.answers = []

    def __call__(self, answered):
        self.answers.append(answered)


@pytest.fixture
def seen():
    return RecordingHook()


@pytest.fixture
def engine():
    return Scripted()


@pytest.fixture
def port(engine, seen):
    ready = threading.Event()
    with running(lambda: engine, on_ready=lambda _: ready.set(), on_answer=[seen], keep_alive_seconds=0.2) as port:
        assert ready.wait(PATIENCE)
        yield port
    # The server has stopped, so every answer has been reported.
    ids = [answered.request.id for answered in seen.answers]
    assert len(ids) == len(set(ids)), "an answer was reported twice"
    assert sorted(ids) == sorted(request.id for request in engine.requests), "an answer was not reported"


@pytest.fixture
def client(port):
    return client_of(port)


def ask(client, text, **options):
    return client.chat.completions.create(model="cogumi", messages=[{"role": "user", "content": text}], **options)


def one(seen):
    """The only recorded answer."""
    until(lambda: seen.answers)
    (answered,) = seen.answers
    return answered


@pytest.mark.parametrize("stream", [True, False])
def test_chat_answer_is_reported(client, seen, stream):
    response = client.chat.completions.with_raw_response.create(
        model="cogumi:fast", messages=[{"role": "user", "content": "echo abc"}], stream=stream, user="me"
    )
    parsed = response.parse()
    identity = next(iter({chunk.id for chunk in parsed})) if stream else parsed.id
    answered = one(seen)
    assert answered.request_id == response.headers["x-request-id"]
    assert (answered.model, answered.streamed) == ("cogumi:fast", stream)
    assert (answered.request.id, answered.request.user) == (identity, "me")
    assert (answered.reply.text, answered.reply.tier, answered.reply.p_correct) == ("abc", "base", 0.9)
    assert 0 < answered.first_token_seconds <= answered.seconds
    assert (answered.cancelled, answered.error) == (False, None)


@pytest.mark.parametrize("stream", [True, False])
def test_every_choice_of_every_prompt_is_reported(client, seen, stream):
    list(ask(client, "echo ab", n=3, stream=stream))
    until(lambda: len(seen.answers) == 3)
    assert len({answered.request_id for answered in seen.answers}) == 1
    list(client.completions.create(model="cogumi", prompt=["echo a", "echo b"], n=2, stream=stream))
    until(lambda: len(seen.answers) == 7)
    completions = seen.answers[3:]
    assert sorted(answered.reply.text for answered in completions) == ["a", "a", "b", "b"]
    whole = min((answered.request.id for answered in completions), key=len)
    assert sorted(answered.request.id for answered in completions) == [whole, *(f"{whole}-{i}" for i in (1, 2, 3))]
    assert all(answered.streamed == stream for answered in seen.answers)


@pytest.mark.parametrize("stream", [True, False])
def test_empty_answer_is_reported(client, seen, stream):
    answer = ask(client, "held ", stream=stream)
    assert not "".join(c.choices[0].delta.content or "" for c in answer) if stream else answer.choices[0].message
    answered = one(seen)
    assert (answered.reply.text, answered.cancelled, answered.error) == ("", False, None)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("question", "kind"),
    [("busy", BusyError), ("long", ContextError), ("late abc", ContextError), ("break", ZeroDivisionError)],
)
def test_failed_answer_is_reported_with_its_error(client, seen, stream, question, kind):
    with pytest.raises(openai.APIError):
        list(ask(client, question, stream=stream))
    answered = one(seen)
    assert type(answered.error) is kind
    assert (answered.reply, answered.cancelled) == (None, False)
    assert (answered.first_token_seconds is not None) == (question == "late abc")


def test_engine_that_ends_without_a_reply_is_reported(client, engine, seen, monkeypatch):
    monkeypatch.setattr(engine, "generate", lambda request: engine.requests.append(request) or iter(()))
    with pytest.raises(openai.InternalServerError):
        ask(client, "x")
    assert "without a Reply" in str(one(seen).error)


def test_base_exception_of_an_engine_is_reported(client, engine, seen, monkeypatch):
    """Native libraries can raise a `BaseException`; the client must still get an answer."""

    class Panic(BaseException):
        pass

    def generate(request):
        engine.requests.append(request)
        raise Panic("index out of bounds")

    monkeypatch.setattr(engine, "generate", generate)
    with pytest.raises(openai.InternalServerError, match="internal error"):
        ask(client, "x")
    assert "index out of bounds" in str(one(seen).error)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_disconnected_client_is_reported_as_cancelled(port, engine, seen, stream, n):
    body = {"model": "cogumi", "stream": stream, "n": n, "messages": [{"role": "user", "content": "slow"}]}
    send_and_hang_up(port, body, lambda: engine.running == n)
    until(lambda: len(seen.answers) == n)
    assert all(answered.cancelled and answered.error is None for answered in seen.answers)
    assert all(answered.reply is None for answered in seen.answers)


def test_dropped_stream_is_reported_as_cancelled(client, seen):
    with ask(client, "slow", stream=True) as stream:
        next(iter(stream))
    answered = one(seen)
    assert (answered.cancelled, answered.streamed) == (True, True)
    assert answered.first_token_seconds is not None


def test_partial_reply_of_a_cancelled_answer_is_reported(port, engine, seen, monkeypatch):
    """Engines may return the partial reply when they are cancelled."""
    gone, waits = threading.Event(), threading.Event()

    def receive():
        waits.set()
        gone.wait(PATIENCE)
        return Reply("half", (), "cancelled", Usage(3, 1))

    def generate(request):
        engine.requests.append(request)
        return Events(receive, gone.set)

    monkeypatch.setattr(engine, "generate", generate)
    body = {"model": "cogumi", "stream": True, "messages": [{"role": "user", "content": "x"}]}
    send_and_hang_up(port, body, waits.is_set)
    answered = one(seen)
    assert (answered.cancelled, answered.error, answered.reply.text) == (True, None, "half")


def test_failed_choice_cancels_the_others(client, seen):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="cogumi", prompt=["long", "slow", "slow"])
    until(lambda: len(seen.answers) == 3)
    assert sorted((answered.cancelled, answered.error is None) for answered in seen.answers) == [
        (False, False), (True, True), (True, True)
    ]  # fmt: skip


def test_answer_cut_off_by_server_shutdown_is_reported(seen):
    engine, ready = Scripted(), threading.Event()
    with running(lambda: engine, on_ready=lambda _: ready.set(), on_answer=[seen]) as port:
        assert ready.wait(PATIENCE)
        body = {"model": "cogumi", "stream": True, "messages": [{"role": "user", "content": "slow"}]}
        send_and_hang_up(port, body, lambda: engine.running == 1)
    (answered,) = seen.answers
    assert answered.cancelled


def test_requests_that_never_reach_the_engine_are_not_reported(port, seen):
    for body in ("{", '{"model": "no", "messages": [{"role": "user", "content": "x"}]}', '{"model": "cogumi"}'):
        assert raw(port, "POST", "/v1/chat/completions", body)[0] in (400, 404)
    assert raw(port, "POST", "/v1/embeddings", json.dumps({"model": "cogumi", "input": "a"}))[0] == 200
    assert seen.answers == []


def test_hook_errors_do_not_affect_answers(seen, caplog):
    def broken(answered):
        raise ZeroDivisionError("a defect of the hook")

    ready = threading.Event()
    hooks = [broken, seen]
    with (
        caplog.at_level(logging.WARNING, "cogumi"),
        running(Scripted, on_ready=lambda _: ready.set(), on_answer=hooks) as port,
    ):
        assert ready.wait(PATIENCE)
        client = client_of(port)
        for _ in range(3):
            assert ask(client, "echo abc").choices[0].message.content == "abc"
            chunks = list(ask(client, "echo abc", stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "abc"
    assert len(seen.answers) == 6
    warnings = [record for record in caplog.records if record.name.startswith("cogumi")]
    assert len(warnings) == 1
    assert "broken" in warnings[0].getMessage()


def test_clients_do_not_wait_for_a_hook():
    asked, over = threading.Event(), threading.Event()

    def slow(answered):
        asked.set()
        over.wait(2 * PATIENCE)

    ready = threading.Event()
    with running(Scripted, on_ready=lambda _: ready.set(), on_answer=[slow]) as port:
        assert ready.wait(PATIENCE)
        client = client_of(port)
        try:
            assert ask(client, "echo abc").choices[0].message.content == "abc"
            assert asked.wait(PATIENCE)
        finally:
            over.set()
