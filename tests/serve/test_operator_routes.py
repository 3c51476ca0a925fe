"""Personal routing and modifiers over HTTP, on a real bundle."""

import json
import shutil
from urllib.parse import quote

import pytest

from cogumi.cascade.opening import open_cascade
from cogumi.compress.gguf.export import export_adapter
from support.bundle import make_bundle
from support.engines import pico
from support.pico import make_adapter
from support.serve import raw, ready


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("operator")
    make_bundle(root)
    folder = root / "modifiers"
    folder.mkdir()
    export_adapter(make_adapter(root / "law", root / "base", seed=9), root / "base", folder / "law.gguf")
    shutil.copy(folder / "law.gguf", root / "outside.gguf")
    shutil.copy(pico().other_adapter_gguf, folder / "other.gguf")
    (folder / "link.gguf").symlink_to(root / "outside.gguf")
    (folder / "inside.gguf").symlink_to(folder / "law.gguf")
    (folder / "circle.gguf").symlink_to(folder / "circle.gguf")
    (folder / "deep").mkdir()
    shutil.copy(folder / "law.gguf", folder / "deep" / "law.gguf")
    return root


def served(made, state=None, **options):
    """Serve the bundle; yields the port."""
    return ready(lambda: open_cascade(made / "bundle", threads=1, slots=2, state=state), **options)


def call(port, method, path, body=None):
    status, _, data = raw(port, method, path, None if body is None else json.dumps(body))
    return status, json.loads(data)


def models(port):
    return [model["id"] for model in call(port, "GET", "/v1/models")[1]["data"]]


def test_modifier_can_be_added_used_and_persisted(made, tmp_path):
    chat = {"messages": [{"role": "user", "content": "What is 2 + 3?"}], "max_tokens": 8, "model": "cogumi:base+law"}
    with served(made, tmp_path, modifiers=made / "modifiers") as port:
        assert call(port, "POST", "/v1/chat/completions", chat)[0] == 404
        status, added = call(port, "POST", "/v1/modifiers", {"name": "law", "file": "law.gguf"})
        assert (status, added["id"], added["object"]) == (201, "cogumi:base+law", "model")
        assert "cogumi:base+law" in models(port)
        status, answer = call(port, "POST", "/v1/chat/completions", chat)
        assert (status, answer["cogumi"]["tier"], answer["cogumi"]["accepted"]) == (200, "", False)
        assert call(port, "POST", "/v1/modifiers", {"name": "inside", "file": "inside.gguf"})[0] == 201
    with served(made, tmp_path) as port:
        assert {"cogumi:base+law", "cogumi:base+inside"} <= set(models(port))
        again = call(port, "POST", "/v1/chat/completions", chat)[1]
        assert again["choices"][0]["message"] == answer["choices"][0]["message"]
        status, refused = call(port, "POST", "/v1/modifiers", {"name": "new", "file": "law.gguf"})
        assert (status, refused["error"]["code"]) == (403, "modifiers_off")
        assert refused["error"]["message"].endswith("start it with --modifiers FOLDER")


@pytest.mark.parametrize(
    ("name", "file", "status", "message"),
    [
        ("new", "../outside.gguf", 400, "is not the name of a file"),
        ("new", "{root}/outside.gguf", 400, "is not the name of a file"),
        ("new", "{root}/modifiers/law.gguf", 400, "is not the name of a file"),
        ("new", "deep/law.gguf", 400, "is not the name of a file"),
        ("new", "./law.gguf", 400, "is not the name of a file"),
        ("new", "..", 400, "is not the name of a file"),
        ("new", ".", 400, "is not the name of a file"),
        ("new", "law\0.gguf", 400, "is not the name of a file"),
        ("new", "link.gguf", 400, "is not the name of a file"),
        ("new", "deep", 404, "there is no file 'deep'"),
        ("new", "gone.gguf", 404, "there is no file 'gone.gguf'"),
        ("new", "x" * 256, 400, "at most 255"),
        ("new", "é" * 200, 404, "there is no file"),
        ("new", "circle.gguf", 400, "is not the name of a file"),
        ("code", "law.gguf", 400, "the modifier name 'code' is already in use"),
        ("../x", "law.gguf", 400, "is not a valid modifier name"),
        ("new", "other.gguf", 400, "is not an adapter for base.gguf"),
    ],
)
def test_invalid_additions_are_refused(refusing, name, file, status, message):
    root, port = refusing
    told, answer = call(port, "POST", "/v1/modifiers", {"name": name, "file": file.format(root=root)})
    assert (told, message in answer["error"]["message"]) == (status, True), answer
    assert "\n" not in answer["error"]["message"]
    assert not any("+new" in model for model in models(port))


@pytest.fixture(scope="module")
def refusing(made):
    with served(made, modifiers=made / "modifiers") as port:
        yield made, port


def test_personal_routing_can_be_read_and_switched(made, tmp_path):
    with served(made, tmp_path) as port:
        user = quote("ann & co")
        shown = {"user": "ann & co", "on": False, "rated": 0, "needed": 50, "offsets": {}}
        assert call(port, "GET", f"/v1/personal?user={user}") == (200, shown)
        assert call(port, "POST", "/v1/personal", {"user": "ann & co", "on": True}) == (200, shown | {"on": True})
        assert call(port, "GET", f"/v1/personal?user={user}") == (200, shown | {"on": True})
        assert call(port, "POST", "/v1/personal", {"user": "ann & co", "on": False}) == (200, shown)
        for method, path, body in (
            ("GET", "/v1/personal", None),
            ("GET", "/v1/personal?user=", None),
            ("POST", "/v1/personal", {"user": "", "on": True}),
            ("POST", "/v1/personal", {"user": "ann"}),
        ):
            assert call(port, method, path, body)[0] == 400


def test_personal_routing_needs_a_memory(refusing):
    status, told = call(refusing[1], "POST", "/v1/personal", {"user": "ann", "on": True})
    assert (status, "personal routing needs a state folder" in told["error"]["message"]) == (400, True)
