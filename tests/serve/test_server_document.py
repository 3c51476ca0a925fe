"""The examples of docs/server.md, run unchanged over a bundle of pico models."""

import re
from pathlib import Path

import openai
import pytest
import uvicorn

import cogumi
from cogumi.serve.app import create_app
from support.bundle import make_bundle
from support.serve import raw, serving
from support.waiting import until

DOCUMENT = Path(__file__).parents[2] / "docs" / "server.md"
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", DOCUMENT.read_text("utf-8"), re.DOTALL | re.MULTILINE)


async def ui(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"a page"})


@pytest.fixture
def names(tmp_path, monkeypatch):
    """The names that the examples define, with a bundle at the path they use."""
    (tmp_path / "runs" / "smollm2").mkdir(parents=True)
    make_bundle(tmp_path / "runs" / "smollm2")
    monkeypatch.chdir(tmp_path)
    defined = {"ui": ui}
    for example in EXAMPLES:
        exec(example, defined)
    return defined


def answer_at(port, prefix=""):
    until(lambda: raw(port, "GET", f"{prefix}/ready")[0] == 200)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}{prefix}/v1", api_key="any", max_retries=0, timeout=60)
    messages = [{"role": "user", "content": "What is 48 plus 57?"}]
    return client.chat.completions.create(model="cogumi", messages=messages, max_tokens=4)


def test_factory_runs_under_uvicorn(names, tmp_path, monkeypatch):
    (tmp_path / "llm.py").write_text(EXAMPLES[0])
    monkeypatch.syspath_prepend(tmp_path)
    config = uvicorn.Config("llm:make", factory=True)
    config.load()
    with serving(config.loaded_app) as port:
        assert answer_at(port).model_extra["cogumi"]["tier"]


def test_mounted_applications_answer(names):
    with serving(names["app"]) as port:
        assert raw(port, "GET", "/ui/")[2] == b"a page"
    with serving(names["outer"]) as port:
        assert answer_at(port, "/llm").model_extra["cogumi"]["tier"]


def test_hook_prints_each_answer(names, capsys):
    app = create_app(lambda: cogumi.open("runs/smollm2/bundle"), on_answer=[names["hook"]])
    with serving(app) as port:
        answer = answer_at(port)
    printed = capsys.readouterr().out
    assert answer.model_extra["cogumi"]["route"] in printed
    assert printed.startswith("req_")
