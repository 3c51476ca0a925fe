"""`cogumi chat`, `eval`, `serve` and `forget` as real processes over a bundle of pico models."""

import contextlib
import json
import re
import signal
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from cogumi.cascade.asking import Conversation
from cogumi.cascade.disclaimers import LOW_CONFIDENCE
from cogumi.cascade.memory.turns import FILE, Memory, Turn
from cogumi.cascade.opening import open_cascade
from cogumi.core.types import ABSTENTION
from support.bundle import make_bundle
from support.cli import COGUMI, cogumi, one_line
from support.serve import raw, running, send_and_hang_up
from support.waiting import PATIENCE, Gate, until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="module")
def cascade(folder):
    with contextlib.closing(open_cascade(folder, slots=2, threads=1)) as cascade:
        yield cascade


@contextlib.contextmanager
def serving(folder, *words, command="serve"):
    """Run `cogumi serve` in a separate process; yields the process and its output when it is ready."""
    command = [*COGUMI, command, folder, "--port", "0", "--json", "--threads", "1", *words]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    said = ""
    try:
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        yield process, json.loads(said)
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def client(folder):
    with serving(folder, "--slots", "2") as (_, said):
        yield openai.OpenAI(base_url=said["url"], api_key="any", max_retries=0, timeout=PATIENCE)


def ask(client, text, model="cogumi:fast", **options):
    options = {"max_tokens": 12} | options
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **options)


def test_chat_uses_the_examples_of_a_file(folder, tmp_path):
    file = tmp_path / "examples.jsonl"
    file.write_text('{"question": "What is 1 + 1?", "answer": "two"}\n\n{"question": "2 + 2?", "answer": "four"}\n')
    answer = json.loads(cogumi("chat", folder, "--once", "What is 3 + 4?", "--examples", file, "--json").stdout)
    assert (answer["tier"], answer["p_correct"]) == ("base+examples", None)
    assert next(d for d in answer["decisions"] if d["signal"] == "examples")["value"] == 2
    for text, message in (
        ("", "holds no example"),
        ('{"question": "q"}', "line 1 is not an example"),
        ("\nx", "line 2 is not"),
    ):
        file.write_text(text)
        refused = cogumi("chat", folder, "--once", "x", "--examples", file, ok=1)
        assert message in refused.stderr
    file.write_bytes(b"\xff\xfe")
    assert "is not UTF-8" in cogumi("chat", folder, "--once", "x", "--examples", file, ok=1).stderr
    file.unlink()
    assert "cannot be read: No such file" in cogumi("chat", folder, "--once", "x", "--examples", file, ok=1).stderr


def test_chat_once_prints_tier_confidence_and_reasons(folder):
    shown = cogumi("chat", folder, "--mode", "fast", "--why", "--once", "What is 3 + 4?").stdout
    assert "base · P(correct) 70%" in shown
    short = cogumi("chat", folder, "--mode", "fast", "--once", "What is 3 + 4?").stdout
    assert short.endswith("\n  sure: base, 70%, 50% needed\n")
    assert "meets the threshold 0.50" in shown
    answer = json.loads(cogumi("chat", folder, "--once", "What is 3 + 4?", "--json").stdout)
    assert (answer["route"], answer["question"]) == ("low_confidence", "What is 3 + 4?")
    assert "confidence" not in answer["answer"]
    assert [d["tier"] for d in answer["decisions"]][:3] == ["draft", "base", "modifier:code"]


def test_chat_handles_commands_and_errors(folder, tmp_path):
    (tmp_path / "runs" / "pico").mkdir(parents=True)
    (tmp_path / "runs" / "pico" / "bundle").symlink_to(folder)
    lines = [
        "/help",
        "/mode nope",
        "/mode fast",
        "Hello?",
        "/wrong",
        "long " * 600,
        "/new",
        "/nope",
        "Hello?",
        "/quit",
        "unread",
    ]
    done = cogumi("chat", cwd=tmp_path, stdin="\n".join(lines))
    assert len(re.findall(r"\n  (?:sure|not sure|declined|not calibrated): ?", done.stdout)) == 2
    assert done.stdout.count("P(correct)") == 0  # only /why shows more than one line
    assert "unknown mode 'nope'" in done.stdout
    assert "--state" in done.stdout  # ratings need a state folder
    assert "unknown command /nope" in done.stdout
    assert done.stderr.startswith("cogumi: ")
    assert "context" in done.stderr
    ended = cogumi("chat", folder, stdin="Hello?\n/why").stdout  # ends at the end of the input
    assert ended.count("P(correct)") == 1
    assert ended.endswith("chat ended\n")


def test_conversation_history_contains_no_disclaimers(cascade):
    conversation = Conversation(cascade, note=True)
    first = conversation.ask("What is 3 + 4?")
    stream = conversation.stream("And 5?")
    pieces, second = list(stream), stream.reply
    assert first.text.endswith(LOW_CONFIDENCE)
    assert "".join(pieces) == second.text
    assert second.usage.prompt_tokens > first.usage.prompt_tokens
    assert [m.role for m in conversation.messages] == ["user", "assistant"] * 2
    assert not any(LOW_CONFIDENCE in m.content for m in conversation.messages)


def test_bundle_with_a_flipped_byte_is_refused(folder, tmp_path):
    broken = tmp_path / "bundle"
    subprocess.run(["cp", "-r", folder, broken], check=True)
    data = bytearray((broken / "base.gguf").read_bytes())
    data[-1] ^= 1
    (broken / "base.gguf").write_bytes(data)
    for words in (["chat", broken, "--once", "x"], ["inspect", broken]):
        assert "base.gguf" in one_line(cogumi(*words, ok=1))
    assert "base.gguf" in cogumi("serve", broken, "--port", "0", ok=1).stderr


def test_inspect_a_bundle(folder):
    found = json.loads(cogumi("inspect", folder, "--json").stdout)
    assert (found["what"], found["modifiers"]) == ("bundle", ["code", "math"])
    assert found["bytes"] == sum(path.stat().st_size for path in folder.rglob("*.*") if path.name != "bundle.json")
    assert "modifiers/code.gguf" in cogumi("inspect", folder).stdout


def test_eval_grades_the_users_questions(folder, tmp_path):
    said = json.loads(cogumi("chat", folder, "--mode", "fast", "--once", "What is 3 + 4?", "--json").stdout)["answer"]
    rows = [{"instruction": "What is 3 + 4?", "output": said, "domain": "math", "difficulty": 1}]
    rows += [{"instruction": f"What is {i} + 4?", "output": "no such answer", "domain": "math"} for i in range(3)]
    data = tmp_path / "rows.jsonl"
    data.write_text("{broken\n" + "\n".join(map(json.dumps, rows)))
    base = json.loads(cogumi("eval", folder, "--data", data, "--tier", "base", "--json").stdout)
    assert base["accuracy"] == {"math": {"1": [1, 1], "none": [0, 3]}}
    assert (base["coverage"], base["accepted_error"]) == (None, None)
    assert len(base["rejected"]) == 1
    whole = json.loads(cogumi("eval", folder, "--data", data, "--limit", "2", "--json").stdout)
    assert (whole["n"], whole["coverage"]) == (2, 0.0)  # the default mode accepts no answer of this bundle
    assert "50.0%" in cogumi("eval", folder, "--data", data, "--limit", "2").stdout
    for tier in ("draft", "modifier:math"):
        cogumi("eval", folder, "--data", data, "--tier", tier)
    exam = tmp_path / "exam.jsonl"
    exam.write_text(json.dumps({"Stem": "What is 3 + 4?", "Key": said}))
    columns = ("--column", "question=Stem", "--column", "answer=Key")
    named = cogumi("eval", folder, "--data", exam, *columns, "--tier", "base", "--json").stdout
    assert json.loads(named)["n"] == 1
    assert "modifier:code" in one_line(cogumi("eval", folder, "--data", data, "--tier", "best", ok=1))


def test_suite_names_its_missing_inputs(tmp_path):
    assert "did you mean 'honesty'?" in one_line(cogumi("eval", "--suite", "honest", cwd=tmp_path, ok=1))
    assert "the suite 'honesty' needs a bundle" in cogumi("eval", "--suite", "honesty", cwd=tmp_path, ok=1).stderr
    assert "--data FILE, or a suite with --suite" in one_line(cogumi("eval", cwd=tmp_path, ok=1))
    given = ("--judge", "bundle", "--tier", "base")
    assert "--tier, --judge does not apply to a suite" in one_line(
        cogumi("eval", "--suite", "honesty", *given, cwd=tmp_path, ok=1)
    )


def test_ratings_are_stored_in_the_state_folder_and_can_be_forgotten(folder, tmp_path):
    state, settings = tmp_path / "state", tmp_path / "settings.yaml"
    settings.write_text("modes: {brief: {}}\ndefault: brief\n")
    options = ("--state", state, "--settings", settings, "--reuse", "exact")
    with serving(folder, "--slots", "2", *options) as (_, said):
        client = openai.OpenAI(base_url=said["url"], api_key="any", max_retries=0, timeout=PATIENCE)
        assert "cogumi:brief" in said["models"]
        plain = {"cogumi": {"speculate": False}}
        answer = ask(client, "What is 3 + 4?", model="cogumi", user="ann", n=2, extra_body=plain)
        assert answer.model_extra["cogumi"]["route"] == "base"  # the default mode comes from the settings
        for id, user, status in (
            (answer.id, "ann", 204),
            (f"{answer.id}-1", "ann", 204),
            (answer.id, "bob", 404),
            ("never given", "ann", 404),
            ("", "ann", 400),
        ):
            body = json.dumps({"id": id, "user": user, "right": False})
            assert raw(int(said["url"].split(":")[2].split("/")[0]), "POST", "/v1/feedback", body)[0] == status
    assert "2 turns of ann deleted" in cogumi("forget", "ann", "--state", state).stdout
    assert "0 turns of ann deleted" in cogumi("forget", "ann", "--state", state).stdout
    assert "holds no memory" in one_line(cogumi("forget", "ann", "--state", tmp_path, ok=1))
    said = cogumi("chat", folder, "--state", state, stdin="What is 3 + 4?\n/right\n").stdout
    assert "rating saved" in said
    assert "unknown value 'often' of reuse" in cogumi("serve", folder, "--port", "0", "--reuse", "often", ok=1).stderr


def test_personal_routing_can_be_enabled_and_shown(folder, tmp_path):
    state = tmp_path / "state"
    lines = ["/personal", "/personal on", "/personal maybe", "What is 3 + 4?", "/wrong", "/personal", "/quit"]
    said = cogumi("chat", folder, "--state", state, stdin="\n".join(lines)).stdout
    assert said.count("personal routing of local: on") == 2
    assert said.index("personal routing of local: off") < said.index("personal routing of local: on")
    assert "rated answers: 1 (at least 50 are needed)" in said
    assert "use /personal on, /personal off" in said
    shown = json.loads(cogumi("personal", "local", "--state", state, "--json").stdout)
    assert shown == {"user": "local", "on": True, "rated": 1, "needed": 50, "offsets": {}}
    assert "personal routing of local: off" in cogumi("personal", "local", "--off", "--state", state).stdout
    assert json.loads(cogumi("personal", "ann", "--on", "--state", state, "--json").stdout)["on"]
    assert "holds no memory" in one_line(cogumi("personal", "ann", "--state", tmp_path, ok=1))
    assert "personal routing needs a state folder" in cogumi("chat", folder, stdin="/personal on\n").stdout


def test_offsets_of_a_user_are_shown(tmp_path):
    with contextlib.closing(Memory(tmp_path / FILE)) as memory:
        for i in range(60):
            turn = Turn(
                f"t{i}", "ann", "", time.time(), "q", "a", "math", "base", "base", "fast", 0.9, {"x": 1.0}, None
            )
            memory.remember(turn)
            memory.rate(turn.id, "ann", False)
    said = cogumi("personal", "ann", "--on", "--state", tmp_path).stdout
    assert re.search(r"rated answers: 60 .*\n  all: -[01]\.\d\d on the logit of P\(correct\)", said)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--modifiers", "gone"), "gone is not a folder"),
        (("--adapter-memory", "much"), "'much' is not an amount of bytes; write it like 80GB"),
        (("--base-url", "http://127.0.0.1:1/v1"), "--base-url and --base-model must be given together"),
        (("--base-model", "m"), "--base-url and --base-model must be given together"),
        (("--reuse-check", "gone.json"), "a reuse check applies to similar questions"),
        (("--host", "0.0.0.0"), "other machines can reach 0.0.0.0: give --keys FILE, or --open"),
        (("--keys", "gone.json"), "there is no key file gone.json; make one: cogumi keys add"),
        (("--tls-key", "key.pem"), "HTTPS needs both --tls-certificate and --tls-key"),
        (("--tls-key", "key.pem", "--tls-certificate", "gone.pem"), "gone.pem"),
    ],
)
def test_invalid_serve_options_are_refused_before_listening(folder, tmp_path, words, message):
    done = cogumi("serve", folder, "--port", "0", *words, cwd=tmp_path, ok=1)
    assert message in done.stderr.splitlines()[-1]


def test_keys_are_added_listed_and_revoked_while_a_server_runs(folder, tmp_path):
    file = ("--keys", tmp_path / "keys.json")
    done = cogumi("keys", "add", "anna", *file, "--requests", "60")
    secret = done.stdout.strip()
    assert "not stored" in done.stderr
    json_key = json.loads(cogumi("keys", "add", "otto", *file, "--json").stdout)["key"]
    listed = cogumi("keys", "list", *file).stdout
    assert "anna" in listed
    assert secret not in listed
    assert [key["name"] for key in json.loads(cogumi("keys", "list", *file, "--json").stdout)] == ["anna", "otto"]
    with serving(folder, *map(str, file), "--host", "0.0.0.0") as (_, said):
        url = said["url"].replace("0.0.0.0", "127.0.0.1")
        for key in (secret, json_key):
            client = openai.OpenAI(base_url=url, api_key=key, max_retries=0, timeout=PATIENCE)
            assert ask(client, "What is 3 + 4?").choices[0].message.content
        cogumi("keys", "revoke", "otto", *file)
        with pytest.raises(openai.AuthenticationError):
            ask(client, "What is 3 + 4?")
    assert "there is no key 'otto'; there are: anna" in cogumi("keys", "revoke", "otto", *file, ok=1).stderr


def test_page_is_served_beside_the_api(folder, tmp_path):
    for command in (["ui", folder], ["serve", folder, "--ui"]):
        with serving(*command[1:], command=command[0]) as (_, said):
            assert said["page"] == said["url"].removesuffix("/v1") + "/ui"
            with urllib.request.urlopen(f"{said['page']}/", timeout=PATIENCE) as page:
                assert b"window.cogumi" in page.read()
            client = openai.OpenAI(base_url=said["url"], api_key="any", max_retries=0, timeout=PATIENCE)
            assert ask(client, "What is 3 + 4?").choices[0].message.content


def test_remote_base_answers_and_missing_capabilities_are_reported(folder, client):
    options = ("--base-url", client.base_url, "--base-model", "cogumi:base")
    done = cogumi("chat", folder, "--once", "What is 3 + 4?", "--json", *options, "--adapter-memory", "1MB")
    answer = json.loads(done.stdout)
    assert (answer["tier"], answer["accepted"], answer["p_correct"]) == ("base", False, None)
    assert done.stderr.startswith("cogumi: the base (RemoteEngine) has no ")
    assert len(done.stderr.splitlines()) == 3


def test_serve_answers_for_every_model_name(client):
    names = [model.id for model in client.models.list()]
    assert {
        "cogumi",
        "cogumi:fast",
        "cogumi:accurate",
        "cogumi:base",
        "cogumi:draft",
        "cogumi:base+code",
    } <= {*names}
    for name in names:
        assert ask(client, "What is 3 + 4?", model=name).usage.completion_tokens >= 1


def test_serve_reports_tier_and_confidence(client):
    raw = client.chat.completions.with_raw_response.create(
        model="cogumi:fast", messages=[{"role": "user", "content": "What is 3 + 4?"}], max_tokens=12
    )
    ours = raw.parse().model_extra["cogumi"]
    assert (ours["tier"], ours["p_correct"]) == ("base", pytest.approx(0.7))
    assert ours["decisions"][-1]["accepted"]
    assert (raw.headers["x-cogumi-tier"], raw.headers["x-cogumi-p-correct"]) == ("base", "0.7000")


# without `speculate`, the measured speed would decide, and the route contains that decision
@pytest.mark.parametrize("speculate", [False, True])
@pytest.mark.parametrize("model", ["cogumi:fast", "cogumi:accurate", "cogumi:base+math"])
def test_stream_equals_the_plain_answer(client, model, speculate):
    options = {"model": model, "logprobs": True, "extra_body": {"cogumi": {"speculate": speculate}}}
    whole = ask(client, "What is 3 + 4?", **options)
    chunks = list(ask(client, "What is 3 + 4?", stream=True, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].model_extra["cogumi"]["route"] == whole.model_extra["cogumi"]["route"]
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in whole.choices[0].logprobs.content]
    cut = "\ufffd"  # a character that the last token leaves incomplete is in its token, not in the content
    assert "".join(e.token for e in streamed).rstrip(cut) == whole.choices[0].message.content.rstrip(cut)


def test_content_is_the_answer_and_nothing_else_unless_a_note_is_wanted(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    formatted = ask(client, "What is 3 + 4?", model="cogumi", max_tokens=64, response_format=wanted)
    assert not formatted.model_extra["cogumi"]["accepted"]
    assert json.loads(formatted.choices[0].message.content)["n"] in (1, 2)
    options = {"max_tokens": 64, "response_format": wanted, "extra_body": {"cogumi": {"abstain": True}}}
    withheld = ask(client, "What is 3 + 4?", model="cogumi", **options).choices[0].message
    assert (withheld.content, withheld.refusal) == (None, ABSTENTION)
    chunks = list(ask(client, "What is 3 + 4?", model="cogumi", stream=True, **options))
    assert "".join(c.choices[0].delta.refusal or "" for c in chunks) == ABSTENTION
    assert not any(c.choices[0].delta.content for c in chunks)
    short = ask(client, "What is 3 + 4?", model="cogumi", max_tokens=1)
    assert len(short.choices[0].message.content) < 20  # one token of a small vocabulary
    for stream in (False, True):
        noted = ask(client, "What is 3 + 4?", model="cogumi", stream=stream, extra_body={"cogumi": {"note": True}})
        parts = [c.choices[0].delta.content or "" for c in noted] if stream else [noted.choices[0].message.content]
        assert "".join(parts).endswith(LOW_CONFIDENCE)


def test_unsure_answer_can_be_withheld(client):
    options = {"model": "cogumi", "extra_body": {"cogumi": {"abstain": True}}}
    assert ask(client, "What is 3 + 4?", **options).choices[0].message.content == ABSTENTION
    chunks = list(ask(client, "What is 3 + 4?", stream=True, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ABSTENTION


def test_examples_of_a_request_reach_the_base_and_are_never_accepted(client):
    examples = [{"question": "What is 1 + 1?", "answer": "two"}]
    ours = {"cogumi": {"examples": examples}}
    given = ask(client, "What is 3 + 4?", extra_body=ours)
    alone = ask(client, "What is 3 + 4?")
    assert (given.model_extra["cogumi"]["tier"], given.model_extra["cogumi"]["p_correct"]) == ("base+examples", None)
    assert given.usage.prompt_tokens > alone.usage.prompt_tokens
    for wrong, message in (
        ({"examples": examples, "adapt": True}, "no adaptable head"),
        ({"adapt": True}, "give examples"),
        ({"examples": [{"question": "long " * 600, "answer": "a"}]}, "shorten"),
        ({"examples": [{"question": "q", "answer": " "}]}, "example 0 has an empty"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            ask(client, "x", extra_body={"cogumi": wrong})
    with pytest.raises(openai.BadRequestError, match="give messages"):
        client.completions.create(model="cogumi:base", prompt="x", extra_body=ours)


def test_serve_refuses_unanswerable_requests(client):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, "long " * 600, stream=stream)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="unknown adapter"):
            ask(client, "x", stream=stream, extra_body={"cogumi": {"modifier": "cooking"}})
        with pytest.raises(openai.BadRequestError, match="unknown mode"):
            ask(client, "x", model="cogumi", stream=stream, extra_body={"cogumi": {"mode": "best"}})
    with pytest.raises(openai.NotFoundError):
        ask(client, "x", model="gpt-4o")


def test_concurrent_clients_get_their_own_answers(client):
    questions = [f"What is {i} + 4?" for i in range(12)]
    alone = [ask(client, q).choices[0].message.content for q in questions]
    with ThreadPoolExecutor(12) as threads:
        together = list(threads.map(lambda q: ask(client, q).choices[0].message.content, questions))
    assert together == alone


@pytest.mark.parametrize("mode", ["fast", "accurate"])
def test_disconnected_client_frees_its_slot(folder, mode, monkeypatch):
    """The answer is held in the middle until the base receives the cancellation."""
    gate, cascade = Gate(monkeypatch), open_cascade(folder, slots=2, threads=1)
    base, answers, generate = cascade.tiers.base, [], cascade.generate
    monkeypatch.setattr(cascade, "generate", lambda request: answers.append(generate(request)) or answers[-1])
    body = {"model": f"cogumi:{mode}", "stream": True, "max_tokens": 480}
    body["messages"] = [{"role": "user", "content": "What is 3 + 4?"}]
    with running(lambda: cascade) as port:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="any", timeout=PATIENCE)
        until(lambda: raw(port, "GET", "/ready")[0] == 200)
        for _ in range(3):
            gate.shut(after=3, engine=base)
            send_and_hang_up(port, body, gate.reached.is_set)
            until(lambda: answers[-1]._done)  # the server has noticed
            gate.shut(after=1, engine=base)  # the cascade notices between two tokens
            until(lambda: base._scheduler._cancelled or base.free_slots == 2)
            gate.open()
            until(lambda: base.free_slots == 2)
        assert ask(client, "What is 3 + 4?").usage.completion_tokens == 12


def test_ctrl_c_stops_the_server_cleanly(folder):
    with serving(folder) as (process, said):
        process.send_signal(signal.SIGINT)
        _, noted = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert "Traceback" not in noted
    assert said["models"][0] == "cogumi"
