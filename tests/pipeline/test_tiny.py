"""A small variant of the tiny recipe, end to end: one command builds it, and a second build skips every step."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cogumi.bundle.format import open_bundle
from cogumi.core.artifact import read_manifest, verify
from cogumi.core.files import sha256
from cogumi.data.world.questions import UNANSWERABLE_FACTOR
from cogumi.pipeline.recipe import builtin_recipes, load_recipe
from support.waiting import until

RECIPE = Path(__file__).parent / "pico.yaml"
KEYS = {
    "recipe",
    "fingerprint",
    "seconds",
    "peak_rss_bytes",
    "steps",
    "accuracy",
    "modifiers",
    "speculation",
    "gate",
    "routes",
    "unanswerable",
    "bytes",
    "showcase",
}


def cogumi(*words, **options):
    return subprocess.run([sys.executable, "-m", "cogumi", *words], capture_output=True, text=True, **options)


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def build(runs, jobs=1):
    """Build with one thread per step, for any `jobs`."""
    done = cogumi("build", str(RECIPE), "--runs", str(runs), "--jobs", str(jobs), "--json", env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    return runs / "pico", build(runs)


def weights(home):
    return {
        p.relative_to(home).as_posix(): sha256(p)
        for p in sorted(home.rglob("*"))
        if p.suffix in (".safetensors", ".gguf")
    }


def test_report_has_its_keys_and_consistent_figures(built):
    home, report = built
    assert report.keys() >= KEYS
    assert json.loads((home / "report.json").read_text()) == report
    assert set(report["accuracy"]) == {"draft", "base", "modifier", "cascade"}
    heldout = sum(n for cells in report["accuracy"]["cascade"].values() for _, n in cells.values())
    assert heldout == 8 * (30 + 2 * UNANSWERABLE_FACTOR)
    assert 0.9 * heldout < report["gate"]["n"] <= heldout  # without questions unlike those of the calibration
    assert sum(report["routes"].values()) == pytest.approx(1)
    assert set(report["modifiers"]["math"]) == {"before", "after", "gain", "lost_elsewhere", "control", "n"}
    assert report["unanswerable"]["n"] == sum(n for _, n in report["unanswerable"]["kinds"].values()) == 30
    assert report["speculation"]["identical"] == report["speculation"]["n"] == 20  # exact at Q8_0
    assert 0 < report["speculation"]["acceptance"] < 1
    assert {s["name"] for s in report["steps"]} == {s.name for s in load_recipe(str(RECIPE)).steps}


def test_report_page_links_its_plots(built):
    home, _ = built
    page = (home / "report.md").read_text()
    for name in ("accuracy.png", "reliability.png", "risk.png"):
        assert f"({name})" in page
        assert (home / name).read_bytes().startswith(b"\x89PNG")


def test_second_build_skips_every_step_and_prints_the_same_report(built):
    home, first = built
    before = weights(home)
    second = build(home.parent)
    assert all(step["skipped"] for step in second["steps"])
    assert second["fingerprint"] == first["fingerprint"]
    assert weights(home) == before


def test_concurrent_and_killed_builds_give_the_same_bytes(built, tmp_path):
    """Killed between and inside any step, with two processes instead of one."""
    home, report = built
    for begun in ("base/checkpoint", "responses", "calibration"):
        process = subprocess.Popen(
            [sys.executable, "-m", "cogumi", "build", str(RECIPE), "--runs", str(tmp_path), "--jobs", "2"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ONE_THREAD,
        )
        until(lambda begun=begun, process=process: (tmp_path / "pico" / begun).exists() or process.poll() is not None)
        assert process.poll() is None
        process.kill()
        process.wait()
    again = build(tmp_path, jobs=2)
    assert again["fingerprint"] == report["fingerprint"]
    assert weights(tmp_path / "pico") == weights(home)
    assert len(weights(home)) > 10
    for manifest in (tmp_path / "pico").rglob("manifest.json"):
        verify(manifest.parent)
    for name in ("bundle", "calibration", "base", "router", "data", "responses"):
        files, same = read_manifest(home / name).files, read_manifest(tmp_path / "pico" / name).files
        assert files == same


def test_builtin_recipe_differs_only_in_size():
    """The small recipe runs every stage of the tiny one, except two stages without inputs that have their own tests."""
    apart = {"embedder", "escalation"}  # tests/engine/test_embedder.py, tests/train/test_followup_classifier.py
    assert {s.stage for s in load_recipe("tiny").steps} - apart == {s.stage for s in load_recipe(str(RECIPE)).steps}


def test_mobile_package_is_built_from_its_draft(built, tmp_path):
    """The built-in mobile recipe on the small draft, with less training and without its gates."""
    recipe = yaml.safe_load(builtin_recipes()["mobile"]) | {"extends": str(RECIPE)}
    small = {
        "respond": {"max_tokens": 24},
        "modifier": {"loop": {"steps": 4, "batch": 32}},
        "answers": {"max_tokens": 24},
        "report": {"max_tokens": 24, "speculation_prompts": 4},
    }
    for step in recipe["steps"]:
        step["config"] = step.get("config", {}) | small.get(step["stage"], {})
        step.pop("gates", None)
    path = tmp_path / "mobile.yaml"
    path.write_text(yaml.safe_dump(recipe))
    shutil.copytree(built[0], tmp_path / "pico")
    done = cogumi("build", str(path), "--runs", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report["modifiers"]) == {"math", "code", "tools"}
    assert json.loads((tmp_path / "pico" / "mobile-report.json").read_text()) == report
    for name in ("report.json", "report.md", "accuracy.png"):  # the steps of the cascade stay
        assert (tmp_path / "pico" / name).read_bytes() == (built[0] / name).read_bytes()
    package = tmp_path / "pico" / "mobile_bundle"
    assert report["bytes"].keys() == {path.name for path in package.iterdir() if path.is_file()} - {
        "bundle.json",
        "manifest.json",
    } | {f"modifiers/{name}.gguf" for name in report["modifiers"]}
    assert open_bundle(package).draft is None
    answer = cogumi("chat", str(package), "--once", "What is 3 + 4?", "--json")
    assert json.loads(answer.stdout)["tier"] in ("base", *(f"modifier:{name}" for name in report["modifiers"]))
