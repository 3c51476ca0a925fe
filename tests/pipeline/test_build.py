"""`pipeline.build`: fingerprints, skipped steps, resumption after a kill, gates, a full disk, and the report."""

import json
import resource
import signal
from pathlib import Path

import pytest

from cogumi.cli.inspection import describe
from cogumi.core import artifact, registry
from cogumi.core.errors import CogumiError, GateError, RecipeError, TrainingError
from cogumi.pipeline.build import build
from cogumi.pipeline.build_progress import Silent
from cogumi.pipeline.fingerprint import plan
from cogumi.pipeline.recipe import parse_recipe
from support import toy as toy_stage
from support.toy_builds import contents, finish, recipe, start, step, write_recipe


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(registry.STAGES, "toy", "support.toy")
    monkeypatch.setitem(registry.STAGES, "report", "support.toy_report")


TWO = (step("first"), step("second", inputs={"weights": "first"}, steps=3))


class Log(Silent):
    def __init__(self):
        self.events = []

    def started(self, step, stage, number, of, reason):
        self.events.append((step, number, of, reason))

    def finished(self, step, seconds, skipped, metrics):
        self.events.append(skipped)


def test_second_build_skips_every_step_and_changes_no_file(tmp_path):
    report = build(recipe(*TWO), tmp_path)
    assert [row["skipped"] for row in report["steps"]] == [False, False]
    before, log = contents(tmp_path), Log()
    again = build(recipe(*TWO), tmp_path, progress=log)
    assert log.events == [("first", 1, 2, ""), True, ("second", 2, 2, ""), True]
    assert contents(tmp_path) == before
    assert again["fingerprint"] == report["fingerprint"]
    assert again["build_seconds"] == report["build_seconds"]
    assert not list(tmp_path.rglob("pending.json")) + list(tmp_path.rglob("checkpoint"))
    parents = artifact.load(tmp_path / "small/second").parents
    assert parents == {"weights": artifact.load(tmp_path / "small/first").fingerprint}


def test_report_merges_metrics_pages_and_plots(tmp_path):
    report = build(recipe(step("first"), step("report", stage="report", inputs={"x": "first"})), tmp_path)
    home = tmp_path / "small"
    assert json.loads((home / "report.json").read_text()) == report
    assert report["by"] == {"math": 0.25}
    assert report["recipe"] == "small"
    assert report["steps"][0].keys() == {"name", "stage", "seconds", "skipped", "metrics"}
    assert (home / "report.md").read_text().startswith("# What was measured")
    assert (home / "curve.png").exists()
    assert not (home / "weights-0.bin").exists()
    here = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert report["peak_rss_bytes"] >= 0.9 * here > 1_000_000


def test_failed_build_is_described_instead_of_the_report_of_an_older_one(tmp_path):
    broken = step("second", inputs={"weights": "first"}, gates=[{"metric": "score", "at_least": 1e9}])
    build(recipe(step("first"), step("report", stage="report", inputs={"x": "first"})), tmp_path)
    assert describe(str(tmp_path / "small"))["what"] == "run"
    with pytest.raises(GateError):
        build(recipe(step("first"), broken), tmp_path)
    found = describe(str(tmp_path / "small"))
    assert (found["what"], found["failed_step"]) == ("unfinished run", "second")
    assert "score" in found["error"]
    assert "by" not in found
    assert "first" in found["finished_steps"]
    assert "older build" in found["note"]
    build(recipe(step("first"), step("report", stage="report", inputs={"x": "first"})), tmp_path)
    assert describe(str(tmp_path / "small"))["what"] == "run"


def fingerprints(*steps, **more):
    return [p.fingerprint for p in plan(recipe(*steps, **more))]


def test_fingerprint_depends_only_on_what_affects_the_output(monkeypatch, tmp_path):
    base = fingerprints(*TWO)
    assert fingerprints(step("first", steps=4, delay=0), TWO[1]) == base  # explicit default values
    assert fingerprints(step("renamed"), step("second", inputs={"weights": "renamed"}, steps=3)) == base
    assert fingerprints(step("first", gates=[{"metric": "score", "at_least": 0}]), TWO[1]) == base
    later = fingerprints(TWO[0], step("second", inputs={"weights": "first"}, steps=2))
    assert (later[0] == base[0], later[1] == base[1]) == (True, False)
    for other in (fingerprints(step("first", steps=5), TWO[1]), fingerprints(*TWO, seed=1)):
        assert not set(other) & set(base)
    assert fingerprints(TWO[0], step("second", inputs={"other": "first"}, steps=3))[1] != base[1]
    monkeypatch.setattr(toy_stage, "VERSION", 2)
    assert not set(fingerprints(*TWO)) & set(base)


def test_fingerprint_uses_the_content_of_input_files(tmp_path):
    (tmp_path / "rows.txt").write_text("one")
    mine = recipe(step("first", source="rows.txt"), root=tmp_path)
    build(mine, tmp_path / "runs")
    (tmp_path / "rows.txt").write_text("one")
    assert build(mine, tmp_path / "runs")["steps"][0]["skipped"]
    (tmp_path / "rows.txt").write_text("two")
    log = Log()
    build(mine, tmp_path / "runs", progress=log)
    assert log.events == [("first", 1, 1, "the recipe or an input changed"), False]
    assert (tmp_path / "runs/small/first/copy.txt").read_text() == "two"
    (tmp_path / "rows.txt").unlink()
    with pytest.raises(RecipeError, match=r"step 'first': there is no file .*rows\.txt"):
        build(mine, tmp_path / "runs")


def test_only_a_damaged_step_is_rebuilt(tmp_path):
    build(recipe(*TWO), tmp_path)
    before = contents(tmp_path)
    (tmp_path / "small/first/weights-1.bin").write_bytes(b"oops")
    log = Log()
    build(recipe(*TWO), tmp_path, progress=log)
    assert "weights-1.bin has 4 bytes" in log.events[0][3]
    assert [e for e in log.events if isinstance(e, bool)] == [False, True]
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (step("b", stage="toi"), "step 'b': unknown stage 'toi'; did you mean 'toy'"),
        (step("b", stpes=3), "step 'b': unknown key 'stpes'; did you mean 'steps'?"),
        (step("b", inner={"rat": 1}), "step 'b': inner: unknown key 'rat'; did you mean 'rate'?"),
        (step("b", steps="many"), "step 'b': steps: input should be a valid integer"),
    ],
)
def test_whole_recipe_is_checked_before_anything_runs(tmp_path, bad, message):
    with pytest.raises(RecipeError) as caught:
        build(recipe(step("a"), bad), tmp_path)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_gate_keeps_the_artifact_and_is_checked_again(tmp_path):
    def gated(bound):
        return recipe(step("first", score=0.4), step("second", gates=[{"metric": "score", "at_least": bound}]))

    with pytest.raises(GateError, match=r"'second' failed its gate: score is 0\.5 and must be at least 0\.6"):
        build(gated(0.6), tmp_path)
    with pytest.raises(GateError):
        build(gated(0.6), tmp_path)
    assert [row["skipped"] for row in build(gated(0.5), tmp_path)["steps"]] == [True, True]


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            {"metric": "score", "at_least": 2.0, "relative_to": "first"},
            "0.5 and must be at least 2 times the 0.4",
        ),
        ({"metric": "score", "at_most": 1.0, "relative_to": "first"}, "must be at most 1 times the 0.4"),
        ({"metric": "by.maths", "at_most": 1}, "no metric 'by.maths' ('maths'; did you mean 'math'?)"),
        ({"metric": "by", "at_most": 1}, "is not a number"),
        ({"metric": "missing", "at_most": 1}, "is not a number but None"),
        ({"metric": "by.math", "at_least": 0.3}, "by.math is 0.25 and must be at least 0.3"),
    ],
)
def test_gate_errors_contain_the_metric_and_the_bound(tmp_path, gate, message):
    with pytest.raises(GateError) as caught:
        build(recipe(step("first", score=0.4), step("second", gates=[gate])), tmp_path)
    assert message in str(caught.value)


def test_gates_that_are_met(tmp_path):
    gates = [
        {"metric": "score", "at_least": 1.25, "relative_to": "first"},
        {"metric": "by.math", "at_most": 0.25},
    ]
    build(recipe(step("first", score=0.4), step("second", gates=gates)), tmp_path)


def test_failing_stage_is_named_and_resumes_from_its_checkpoint(tmp_path):
    class Counting(Silent):
        seen = ()

        def advanced(self, step, done, total, figures):
            self.seen = (*self.seen, done)

    with pytest.raises(TrainingError, match=r"^step 'first': the loss is not a number"):
        build(recipe(step("first", fail=True)), tmp_path)
    (tmp_path / "small/first/half.tmp").write_text("left over")
    counting = Counting()
    with pytest.raises(TrainingError):
        build(recipe(step("first", fail=True)), tmp_path, progress=counting)
    assert counting.seen == ()  # all four links came from the checkpoint
    assert not (tmp_path / "small/first/half.tmp").exists()
    build(recipe(step("first")), tmp_path, progress=counting)  # another config: nothing of the old run is used
    assert counting.seen == (1, 2, 3, 4)


def test_missing_role_is_a_recipe_error(tmp_path, monkeypatch):
    (tmp_path / "wanting.py").write_text(
        "from pydantic import BaseModel\nVERSION, KIND, INPUTS = 1, 'x', {'model': 'toy'}\n"
        "class Config(BaseModel): pass\n"
        "def run(config, inputs, out, context): return {'path': inputs['model'].path}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.STAGES, "wanting", "wanting")
    steps = (step("a"), step("b", stage="wanting", inputs={"modle": "a"}))
    with pytest.raises(RecipeError, match="step 'b': the stage needs an input 'model'; given: modle"):
        build(recipe(*steps), tmp_path / "runs")


# In separate processes: kill -9, a full disk, two concurrent builds.


def test_build_killed_at_any_point_resumes_to_the_same_bytes(tmp_path):
    path = write_recipe(tmp_path, step("first", steps=8), step("second", inputs={"w": "first"}, steps=8))
    build(parse_recipe(path.read_text(), "small", tmp_path), tmp_path / "calm")
    moments = ("started first", "advanced first 3", "advanced first 8", "wrote first 0 0", "wrote first 5 2")
    for moment in (*moments, "finished first", "started second", "advanced second 5", "wrote second 7 3"):
        assert finish(start(path, tmp_path / "stormy", kill_at=moment))[0] == -signal.SIGKILL
    code, _, err = finish(start(path, tmp_path / "stormy"))
    assert (code, err) == (0, "")
    assert contents(tmp_path / "stormy") == contents(tmp_path / "calm")


def test_killed_step_resumes_from_its_checkpoint(tmp_path):
    path = write_recipe(tmp_path, step("first", steps=5))
    finish(start(path, tmp_path / "runs", kill_at="advanced first 3"))
    code, out, _ = finish(start(path, tmp_path / "runs"))
    assert code == 0
    assert "started first continues where it was interrupted" in out
    assert "advanced first 5 3" in out


@pytest.mark.parametrize(("writer", "limit"), [("bytes", 20_000), ("safetensors", 100_000)])
def test_full_disk_leaves_no_partial_artifact(tmp_path, writer, limit):
    path = write_recipe(tmp_path, step("first", writer=writer))

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    code, _, err = finish(start(path, tmp_path / "runs", preexec_fn=small_disk))
    folder = tmp_path / "runs/small/first"
    assert code == 1
    assert err.startswith(f"error: step 'first': the disk is full while writing {folder}")
    assert "run the same command again: finished steps are kept" in err
    assert err.count("\n") == 1
    assert not (folder / "manifest.json").exists()
    assert finish(start(path, tmp_path / "runs"))[0] == 0
    build(parse_recipe(path.read_text(), "small", tmp_path), tmp_path / "calm")
    assert contents(tmp_path / "runs") == contents(tmp_path / "calm")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_device_is_reported_in_one_line(tmp_path):
    with pytest.raises(CogumiError, match=r"^step 'second': the disk is full .*finished steps are kept$"):
        build(recipe(step("first"), step("second", writer="full")), tmp_path)
    assert artifact.verify(tmp_path / "small/first")
    assert not (tmp_path / "small/second/manifest.json").exists()


def test_concurrent_builds_in_one_folder_are_refused(tmp_path):
    path = write_recipe(tmp_path, step("first", steps=100_000, delay=0.05))  # until it is killed
    process = start(path, tmp_path)
    process.stdout.readline()
    with pytest.raises(CogumiError, match="another build is running"):
        build(recipe(step("first")), tmp_path)
    process.kill()
    finish(process)
    build(recipe(step("first")), tmp_path)


def test_runs_folder_that_cannot_be_created_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CogumiError, match="cannot be written"):
        build(recipe(step("first")), tmp_path / "file")
