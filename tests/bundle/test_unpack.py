"""`bundle.unpack`: cached, eager and lazy unpacking, a full disk, killed and concurrent processes."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cogumi.bundle.format import EMBEDDER, EXAMPLES, VOCABULARY, write_bundle
from cogumi.bundle.packed import staged
from cogumi.bundle.unpack import STALE_SECONDS, BundleFiles
from cogumi.cascade.opening import open_cascade
from cogumi.cli import packing as commands
from cogumi.cli.console import print_inspection, size
from cogumi.cli.inspection import describe
from cogumi.compress.pack.archive import Config, pack_folder
from cogumi.core.errors import BundleError
from cogumi.core.types import Message, Request
from cogumi.engine.protocol import final_reply
from support.archive import CONTENT, content_of, make_packed, make_plain, write
from support.bundle import make_bundle


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_packed(make_plain(tmp_path_factory.mktemp("plain")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COGUMI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "unpacked"


CHILD = """
import os, signal, sys
from pathlib import Path
from cogumi.bundle.unpack import BundleFiles
def progress(done, total):
    if sys.argv[3] == "die" and done >= 1 << 20:
        os.kill(os.getpid(), signal.SIGKILL)
BundleFiles(Path(sys.argv[1]), sys.argv[2], progress)
print("opened")
"""


def child(packed, mode, *arguments, **options):
    command = [sys.executable, "-c", CHILD, str(packed), mode, *(arguments or ("live",))]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def limit_file_size():
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))


@pytest.mark.parametrize("mode", ["cached", "eager"])
def test_full_disk_is_reported_and_leaves_no_partial_files(packed, tmp_path, cache, mode, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = child(packed, mode, preexec_fn=limit_file_size)
    errors = process.communicate()[1].strip().splitlines()
    assert errors[-1].startswith("cogumi.core.errors.BundleError: cannot unpack base.gguf")
    assert "File too large" in errors[-1]
    left = {name for name in content_of(tmp_path) if "unpacked" in name or "cogumi-" in name}
    assert not any("base.gguf" in name or "/parts/" in name for name in left)
    assert mode == "cached" or not left
    with contextlib.closing(BundleFiles(packed, mode)) as files:  # works again once there is space
        assert files.bundle.base.read_bytes() == CONTENT["base.gguf"]


def test_partial_file_of_a_killed_process_is_removed_when_stale(packed, cache):
    process = child(packed, "cached", "die")
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = cache.glob("*/parts/*")
    assert not list(cache.glob("*/files/base.gguf"))
    files = BundleFiles(packed)
    assert files.bundle.base.read_bytes() == CONTENT["base.gguf"]
    assert left.exists()  # another process may still be writing it
    os.utime(left, (0, left.stat().st_mtime - STALE_SECONDS - 1))
    BundleFiles(packed)
    assert not left.exists()


def test_concurrent_processes_share_the_cache(packed, cache):
    processes = [child(packed, mode) for mode in ("cached", "cached", "lazy")]
    for process in processes:
        out, errors = process.communicate()
        assert out == "opened\n", errors
    (place,) = cache.iterdir()
    assert content_of(place / "files") == content_of(packed.with_name("bundle"))
    assert not list((place / "parts").iterdir())


def test_cache_is_reused_and_repaired(packed, cache):
    reported = []
    first = BundleFiles(packed, "cached", lambda done, total: reported.append(total))
    assert reported
    reported.clear()
    BundleFiles(packed, "cached", lambda done, total: reported.append(total))
    assert not reported
    stamp = first.bundle.base.stat().st_mtime_ns
    assert stamp == (packed / "base.gguf.zst").stat().st_mtime_ns
    first.bundle.base.write_bytes(CONTENT["base.gguf"][:-1] + b"!")
    assert BundleFiles(packed).bundle.base.read_bytes() == CONTENT["base.gguf"]


# Opened as a cascade


@pytest.fixture(scope="module")
def model_bundle(tmp_path_factory):
    """A bundle of pico models with an invalid encoder file, and its packed form."""
    root = tmp_path_factory.mktemp("real")
    bundle = make_bundle(root)
    index = json.loads((bundle / "bundle.json").read_bytes())
    files = {name: bundle / name for name in index["files"]}
    more = {EMBEDDER: b"no model", VOCABULARY: b"{}"}
    more[EXAMPLES] = b'{"domain": "math", "question": "1 + 1?", "answer": "2"}\n'
    write(root / "more", more)
    write_bundle(root / "whole", files | {name: root / "more" / name for name in more}, {"parts": index["parts"]})
    with staged(root / "packed", root / "whole") as part:
        pack_folder(root / "whole", part, Config())
    return root / "whole", root / "packed"


def answers(folder, mode=None):
    questions = [Request(messages=(Message("user", q),), max_tokens=8, seed=1) for q in ("What is 2 + 3?", "def f")]
    with contextlib.closing(open_cascade(folder, slots=2, context=256, threads=1, unpack=mode)) as cascade:
        direct = Request(prompt="def f", max_tokens=8, adapter="code")
        return [final_reply(cascade.generate(q)).text for q in questions] + [
            final_reply(cascade.tiers.base.generate(direct)).text
        ]


def test_every_mode_gives_the_same_answers(model_bundle, cache, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    whole, packed = model_bundle
    expected = answers(whole)
    assert answers(packed, "eager") == expected
    assert not cache.exists()
    assert not list(tmp_path.glob("cogumi-*"))
    assert answers(packed, "lazy") == expected
    later = {name for name in content_of(whole) if name not in content_of(next(cache.iterdir()) / "files")}
    assert later == {"modifiers/math.gguf", EMBEDDER, VOCABULARY}
    assert answers(packed) == expected
    assert content_of(next(cache.iterdir()) / "files") == content_of(whole)


def test_lazily_unpacked_damage_fails_only_the_request_that_needs_it(model_bundle, tmp_path):
    copy = Path(shutil.copytree(model_bundle[1], tmp_path / "copy"))
    path = copy / "modifiers/code.gguf.zst"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with contextlib.closing(open_cascade(copy, slots=2, context=256, threads=1, unpack="lazy")) as cascade:
        base = cascade.tiers.base
        assert base.adapters == ("code", "math")
        with pytest.raises(BundleError, match=r"code\.gguf\.zst is damaged"):
            final_reply(base.generate(Request(prompt="x", max_tokens=3, adapter="code")))
        assert final_reply(base.generate(Request(prompt="x", max_tokens=3, adapter="math"))).usage.completion_tokens


def test_encoder_is_opened_on_first_use(model_bundle):
    cascade = open_cascade(model_bundle[0], slots=2, context=256, threads=1)
    with contextlib.closing(cascade), pytest.raises(BundleError, match="cannot read the tokenizer"):
        cascade.services.templates.similar("1 + 2?")
    with pytest.raises(BundleError, match="cannot read the tokenizer"):
        open_cascade(model_bundle[0], slots=2, context=256, threads=1, reuse="static")


def test_pack_inspect_unpack_and_chat_commands(model_bundle, tmp_path, capsys):
    whole, _ = model_bundle
    commands.pack(whole, tmp_path / "packed", json=True)
    figures = json.loads(capsys.readouterr().out)
    assert figures["bytes"] == sum(map(len, content_of(whole).values()))
    commands.pack(whole, tmp_path / "again")
    table = capsys.readouterr().out
    assert "Models alone: compression ratio 1." in table
    assert "No dictionary is used: it would save less" in table
    found = describe(str(tmp_path / "packed"))
    assert (found["what"], found["packed_bytes"]) == ("packed bundle", figures["packed_bytes"])
    print_inspection(found)
    assert f"packed size: {size(figures['packed_bytes'])}\n" in capsys.readouterr().out
    commands.unpack(tmp_path / "packed", tmp_path / "back")
    assert content_of(tmp_path / "back") == content_of(whole)
    chat = ("chat", tmp_path / "packed", "--once", "What is 2 + 3?", "--json", "--threads", "1", "--unpack", "lazy")
    done = subprocess.run([sys.executable, "-m", "cogumi", *map(str, chat)], capture_output=True, text=True)
    assert json.loads(done.stdout)["finish_reason"] in ("stop", "length")
    with pytest.raises(BundleError, match="already exists"):
        commands.unpack(tmp_path / "packed", tmp_path / "back")
