"""The command line, run as a real process; the bundle it serves and asks is made of pico models."""

import json
import os
import pty
import socket
import subprocess
import sys

import pytest

COGUMI = [sys.executable, "-m", "cogumi"]


def cogumi(*words, cwd=None, stdin="", ok=0):
    """Run a command to its end and check its exit code."""
    done = subprocess.run(
        [*COGUMI, *map(str, words)], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == ok, done.stderr
    return done


def one_line(done):
    """An error is one line on standard error and nothing on standard output."""
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("cogumi: ")
    return done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe over a user's own file, three of whose rows are broken."""
    folder = tmp_path_factory.mktemp("home")
    rows = [json.dumps({"instruction": f"What is {i} plus 1?", "output": str(i + 1)}) for i in range(400)]
    rows[3:3] = ["{broken", '{"instruction": "no answer"}', "[1]"]
    (folder / "mine.jsonl").write_text("\n".join(rows))
    (folder / "mine.yaml").write_text(
        "name: mine\nsteps:\n  - {name: rows, stage: files, config: {files: {math: [mine.jsonl]}}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def built(home):
    cogumi("build", "mine.yaml", cwd=home)
    return home


def test_help_teaches():
    assert "cogumi demo" in cogumi("--help").stdout
    for command in ("build", "demo", "chat", "serve", "inspect", "eval"):
        assert f"Example: cogumi {command}" in cogumi(command, "--help").stdout
    assert cogumi("--version").stdout.startswith("cogumi 0.")
    assert "No such command" in cogumi("bulid", ok=2).stderr


def test_nothing_heavy_is_imported_for_help():
    heavy = "torch transformers sklearn matplotlib llama_cpp fastapi"
    code = f"import sys, cogumi.cli, cogumi.chat; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_build_shows_each_step_and_then_the_figures(home):
    first = cogumi("build", "mine.yaml", cwd=home)
    assert "[1/1] rows (files)" in first.stderr
    assert "peak memory" in first.stdout
    again = cogumi("build", "mine.yaml", "--json", cwd=home)
    report = json.loads(again.stdout)
    assert (report["recipe"], report["steps"][0]["skipped"]) == ("mine", True)
    assert "unchanged" in again.stderr
    other = cogumi("build", "mine.yaml", "--seed", "7", "--runs", "others", "--json", cwd=home)
    assert json.loads(other.stdout)["fingerprint"] != report["fingerprint"]


def test_on_a_terminal_a_build_has_a_bar(home):
    leader, follower = pty.openpty()
    done = subprocess.run(
        [*COGUMI, "build", "mine.yaml", "--runs", "fresh"], cwd=home, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    assert done.returncode == 0
    assert "✓" in os.read(leader, 100_000).decode()


def test_inspect_tells_what_things_are(built):
    step = json.loads(cogumi("inspect", "runs/mine/rows", "--json", cwd=built).stdout)
    assert (step["what"], step["kind"]) == ("artifact", "examples")
    assert step["files"]["train.jsonl"]["bytes"] > 0
    assert "train.jsonl" in cogumi("inspect", "runs/mine/rows", cwd=built).stdout
    assert (
        json.loads(cogumi("inspect", "mine.yaml", "--json", cwd=built).stdout)["steps"][0]["stage"] == "files"
    )
    assert "rows" in cogumi("inspect", "mine.yaml", cwd=built).stdout
    assert json.loads(cogumi("inspect", "runs/mine", "--json", cwd=built).stdout)["recipe"] == "mine"


def test_inspect_finds_one_flipped_byte(built, tmp_path):
    folder = tmp_path / "rows"
    subprocess.run(["cp", "-r", built / "runs/mine/rows", folder], check=True)
    data = bytearray((folder / "train.jsonl").read_bytes())
    data[100] ^= 1
    (folder / "train.jsonl").write_bytes(data)
    assert "train.jsonl" in one_line(cogumi("inspect", folder, ok=1))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["build", "tinny"], "tinny"),
        (["build", "nowhere.yaml"], "nowhere.yaml"),
        (["build", "typo.yaml"], "did you mean 'files'"),
        (["chat", "empty"], "bundle.json"),
        (["chat"], "cogumi build"),
        (["chat", "--json"], "--once"),
        (["serve", "empty", "--port", "0"], "bundle.json"),
        (["inspect", "nowhere"], "nowhere"),
        (["eval", "empty", "--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["eval", "empty", "--data", "mine.jsonl"], "bundle.json"),
    ],
)
def test_an_error_is_one_line(home, words, named):
    (home / "empty").mkdir(exist_ok=True)
    (home / "typo.yaml").write_text("name: x\nsteps:\n  - {name: a, stage: filse}\n")
    done = cogumi(*words, cwd=home, ok=1)
    if words[0] == "serve":  # it says first what it is loading
        assert done.stderr.splitlines()[-1].startswith("cogumi: ")
        assert named in done.stderr
    else:
        assert named in one_line(done)


def test_debug_shows_where_an_error_comes_from(home):
    assert "Traceback" in cogumi("--debug", "inspect", "nowhere", cwd=home, ok=1).stderr


def test_a_port_in_use_is_told_before_anything_is_loaded(home):
    (home / "empty").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = one_line(cogumi("serve", "empty", "--port", port, cwd=home, ok=1))
    assert str(port) in line
    assert "--port" in line
