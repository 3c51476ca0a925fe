"""API keys, limits per key, and whose data a request may touch."""

import json
import stat
import threading

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import CogumiError
from cogumi.serve import rate_limits
from cogumi.serve.api_keys import KeyFile
from cogumi.serve.rate_limits import MINUTE, Bucket
from support.serve import Scripted, raw, ready, send_and_hang_up
from support.waiting import PATIENCE, until


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with keys whose clock stands still: its port, its engine, its key file."""
    monkeypatch.setattr(rate_limits, "CLOCK", lambda: 0.0)
    keys, engine = KeyFile(tmp_path / "keys.json"), Scripted()
    keys.add("first")
    with ready(lambda: engine, keys=KeyFile(keys.path)) as port:
        yield port, engine, keys


def client(port, secret):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=secret, max_retries=0, timeout=PATIENCE)


def ask(port, secret, text="echo a", **options):
    messages = [{"role": "user", "content": text}]
    made = client(port, secret).chat.completions.with_raw_response
    return made.create(model="cogumi", messages=messages, **{"max_tokens": 10} | options)


def test_requests_need_a_key(served):
    port, _, keys = served
    for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer x"}, {"authorization": "Basic eDp5"}):
        status, answered, data = raw(port, "GET", "/v1/models", headers=headers)
        assert (status, json.loads(data)["error"]["code"]) == (401, "invalid_api_key")
        assert answered["x-request-id"]
    assert raw(port, "GET", "/health")[0] == raw(port, "GET", "/ready")[0] == 200
    secret = keys.add("anna")
    assert ask(port, secret).parse().choices[0].message.content == "a"  # the running server reads the file again
    keys.revoke("anna")
    with pytest.raises(openai.AuthenticationError, match="revoked"):
        ask(port, secret)


def test_key_file_has_no_secret_and_one_reader(tmp_path):
    keys = KeyFile(tmp_path / "new" / "keys.json")
    secret = keys.add("anna", requests=5)
    assert secret not in keys.path.read_text()
    assert stat.S_IMODE(keys.path.stat().st_mode) == 0o600
    (key,) = KeyFile(keys.path).listed()
    assert (key.name, key.requests, key.tokens, secret.startswith(key.prefix)) == ("anna", 5, None, True)
    assert keys.find(secret) == key
    assert keys.find(secret[:-1]) is None
    with pytest.raises(CogumiError, match="already"):
        keys.add("anna")
    with pytest.raises(CogumiError, match="'a b' is not a name"):
        keys.add("a b")
    with pytest.raises(CogumiError, match="no key 'otto'; there are: anna"):
        keys.revoke("otto")


@pytest.mark.parametrize("damage", ["{", '{"keys": [{"name": "x"}]}', "[]"])
def test_damaged_key_file_lets_nobody_in(served, damage):
    port, _, keys = served
    secret = keys.add("anna")
    assert ask(port, secret).status_code == 200
    keys.path.write_text(damage)
    with pytest.raises(openai.InternalServerError, match="cannot check API keys"):
        ask(port, secret)
    with pytest.raises(CogumiError, match="cannot be read"):
        KeyFile(keys.path).listed()
    with pytest.raises(CogumiError, match="cannot be read"):
        keys.add("otto")  # the damaged file is kept
    assert keys.path.read_text() == damage


def test_requests_of_a_key_are_limited_and_refused_ones_do_not_count(served):
    port, _, keys = served
    secret = keys.add("anna", requests=2)
    other = keys.add("otto")
    for left in ("1", "0"):
        with pytest.raises(openai.BadRequestError):
            ask(port, secret, temperature=3)
        answer = ask(port, secret)
        assert (answer.headers["x-ratelimit-limit-requests"], answer.headers["x-ratelimit-remaining-requests"]) == (
            "2", left
        )  # fmt: skip
    with pytest.raises(openai.RateLimitError, match="2 requests a minute") as refused:
        ask(port, secret)
    assert int(refused.value.response.headers["retry-after"]) == MINUTE / 2
    assert "x-ratelimit-limit-requests" not in ask(port, other).headers


def left(answer):
    return int(answer.headers["x-ratelimit-remaining-tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_reserved_before_the_answer_and_the_rest_is_given_back(served, stream):
    """`echo a` has 6 tokens, its answer 2."""
    port, engine, keys = served
    secret = keys.add("anna", tokens=100)
    assert left(ask(port, secret, stream=stream)) == (84 if stream else 92)  # a stream's headers come before its end
    assert left(ask(port, secret)) == 84
    secret = keys.add("otto", tokens=100)
    engine.thought.clear()
    waiting = threading.Thread(target=ask, args=(port, secret, "think a"), kwargs={"max_tokens": 60})
    waiting.start()
    until(lambda: engine.running == 1)
    with pytest.raises(openai.RateLimitError, match="100 tokens a minute"):
        ask(port, secret, max_tokens=60)
    engine.thought.set()
    waiting.join(PATIENCE)
    assert ask(port, secret, max_tokens=40).status_code == 200
    with pytest.raises(openai.RateLimitError, match="lower max_tokens") as refused:
        ask(port, secret, max_tokens=200)
    assert refused.value.response.headers["x-should-retry"] == "false"


def test_tokens_of_a_client_that_left_are_given_back(served):
    port, engine, keys = served
    secret = keys.add("anna", tokens=100)
    body = {"model": "cogumi", "max_tokens": 90, "messages": [{"role": "user", "content": "slow"}]}
    head = {"authorization": f"Bearer {secret}"}
    send_and_hang_up(port, body, lambda: engine.running == 1, headers=head)
    until(lambda: engine.running == 0)
    until(lambda: ask(port, secret, max_tokens=50).status_code == 200)


def test_embeddings_take_tokens(served):
    port, _, keys = served
    made = client(port, keys.add("anna", tokens=50)).embeddings
    made.create(model="cogumi", input=["x" * 20, "x" * 20])
    with pytest.raises(openai.RateLimitError, match="50 tokens"):
        made.create(model="cogumi", input="x" * 20)


def test_user_of_a_request_belongs_to_its_key(served):
    port, engine, keys = served
    anna, otto = keys.add("anna"), keys.add("otto")
    ask(port, anna, user="me")
    ask(port, otto, user="me")
    ask(port, otto)
    assert [request.user for request in engine.requests[-3:]] == ["anna/me", "otto/me", "otto"]
    assert engine.requests[-1].session is None
    ask(port, anna, extra_body={"cogumi": {"session": "s"}})
    assert engine.requests[-1].session == "anna/s"


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 40)), max_size=40), st.integers(1, 30))
@settings(deadline=None)
def test_no_minute_has_more_than_the_limit_twice_over(steps, limit):
    """A bucket that is full at the start of a minute gives its contents and what flows in: at most twice the limit."""
    clock, taken = [0.0], []
    bucket = Bucket(limit, lambda: clock[0])
    for pause, units in steps:
        clock[0] += pause
        wait = bucket.take(units)
        if wait == 0:
            taken.append((clock[0], units))
        elif units <= limit:
            clock[0] += wait + 1e-6
            assert bucket.take(units) == 0
            taken.append((clock[0], units))
    for start, _ in taken:
        assert sum(units for at, units in taken if start <= at < start + MINUTE) <= 2 * limit + 1e-6
