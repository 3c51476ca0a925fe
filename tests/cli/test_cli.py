"""The command line as a real process: help, build, inspect, and one-line errors."""

import json
import os
import pty
import socket
import subprocess
import sys

import pytest

from cogumi.cli.console import print_report
from support.cli import COGUMI, cogumi, one_line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a recipe over a user's own file, which has three invalid rows."""
    folder = tmp_path_factory.mktemp("home")
    rows = [json.dumps({"instruction": f"What is {i} plus 1?", "output": str(i + 1)}) for i in range(400)]
    rows[3:3] = ["{broken", '{"instruction": "no answer"}', "[1]"]
    (folder / "mine.jsonl").write_text("\n".join(rows))
    (folder / "mine.yaml").write_text(
        "name: mine\nsteps:\n  - {name: rows, stage: split, inputs: {pool: mine}}\n"
        "  - {name: mine, stage: load, config: {files: {math: [mine.jsonl]}}}\n"
    )
    return folder


@pytest.fixture(scope="module")
def built(home):
    cogumi("build", "mine.yaml", cwd=home)
    return home


def test_help_shows_commands_and_examples():
    assert "cogumi demo" in cogumi("--help").stdout
    for command in ("build", "demo", "chat", "serve", "inspect", "eval"):
        assert f"Example: cogumi {command}" in cogumi(command, "--help").stdout
    assert cogumi("--version").stdout.startswith("cogumi 0.")
    assert "No such command" in cogumi("bulid", ok=2).stderr


def test_help_imports_no_heavy_libraries():
    heavy = "torch transformers sklearn matplotlib llama_cpp fastapi"
    code = f"import sys, cogumi.cli, cogumi.cli.chat; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_build_prints_each_step_and_then_the_figures(home):
    first = cogumi("build", "mine.yaml", cwd=home)
    assert "[1/2] mine (load)" in first.stderr
    assert "[2/2] rows (split)" in first.stderr
    assert "peak memory" in first.stdout
    again = cogumi("build", "mine.yaml", "--json", cwd=home)
    report = json.loads(again.stdout)
    assert (report["recipe"], report["steps"][0]["skipped"]) == ("mine", True)
    assert "unchanged" in again.stderr
    other = cogumi("build", "mine.yaml", "--seed", "7", "--runs", "others", "--json", cwd=home)
    assert json.loads(other.stdout)["fingerprint"] != report["fingerprint"]


def test_build_on_a_terminal_shows_a_progress_bar(home):
    leader, follower = pty.openpty()
    done = subprocess.run(
        [*COGUMI, "build", "mine.yaml", "--runs", "fresh"], cwd=home, stdout=subprocess.PIPE, stderr=follower
    )
    os.close(follower)
    assert done.returncode == 0
    assert "✓" in os.read(leader, 100_000).decode()


def test_inspect_identifies_artifacts(built):
    step = json.loads(cogumi("inspect", "runs/mine/rows", "--json", cwd=built).stdout)
    assert (step["what"], step["kind"]) == ("artifact", "examples")
    assert step["files"]["train.jsonl"]["bytes"] > 0
    assert "train.jsonl" in cogumi("inspect", "runs/mine/rows", cwd=built).stdout
    assert json.loads(cogumi("inspect", "mine.yaml", "--json", cwd=built).stdout)["steps"][0]["stage"] == "load"
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
        (["build", "typo.yaml"], "did you mean 'split'"),
        (["build", "old.yaml"], "'load' reads your files, and 'split' makes the five sets"),
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
    (home / "typo.yaml").write_text("name: x\nsteps:\n  - {name: a, stage: splitt}\n")
    (home / "old.yaml").write_text("name: x\nsteps:\n  - {name: a, stage: files, config: {files: {math: [a]}}}\n")
    done = cogumi(*words, cwd=home, ok=1)
    if words[0] == "serve":  # the first line says what is loaded
        assert done.stderr.splitlines()[-1].startswith("cogumi: ")
        assert named in done.stderr
    else:
        assert named in one_line(done)


def test_debug_prints_the_traceback(home):
    assert "Traceback" in cogumi("--debug", "inspect", "nowhere", cwd=home, ok=1).stderr


def test_port_in_use_is_reported_before_loading(home):
    (home / "empty").mkdir(exist_ok=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = one_line(cogumi("serve", "empty", "--port", port, cwd=home, ok=1))
    assert str(port) in line
    assert "--port" in line


def test_results_table_contains_the_figures(capsys):
    cells = {"math": {"1": [9, 10], "4": [1, 10]}, "code": {"1": [10, 10], "4": [0, 10]}}
    gate = {"auroc": 0.912, "auroc_perplexity": 0.85, "ece": 0.031, "coverage": 0.5, "accepted_error": 0.04}
    report = {
        "recipe": "tiny",
        "seconds": 200.0,
        "build_seconds": 260.0,
        "peak_rss_bytes": 1_500_000_000,
        "accuracy": {"base": cells},
        "gate": gate | {"bound": 0.05, "accepted": 50},
        "unanswerable": {"confident": 3, "n": 500},
        "modifiers": {"math": {"before": 0.5, "after": 0.75, "n": 20}},
        "speculation": {"acceptance": 0.8, "speedup": 0.9, "identical": 200, "n": 200},
        "routes": {"base": 0.5},
        "bytes": {"base.gguf": 1_234_567},
    }
    print_report(report)
    shown = capsys.readouterr().out
    for figure in ("95.0%", "5.0%", "0.912", "4.0%", "3 of 500", "75.0%", "0.90x", "1.2 MB", "3 min 20 s", "1.50 GB"):
        assert figure in shown
