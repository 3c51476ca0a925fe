"""`pipeline.executors.local`: concurrent steps in worker processes: order, threads, kill, failure, output, memory."""

import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from cogumi.core import artifact, registry
from cogumi.core.errors import CogumiError, GateError, TrainingError
from cogumi.core.files import exclusive_lock
from cogumi.pipeline import build as build_module
from cogumi.pipeline.build import build
from cogumi.pipeline.build_progress import Silent
from cogumi.pipeline.executors.local import LocalProcesses
from cogumi.pipeline.recipe import parse_recipe
from support.toy_builds import contents, finish, recipe, start, step, write_recipe
from support.waiting import until


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(registry.STAGES, "toy", "support.toy")
    monkeypatch.setitem(registry.STAGES, "actor", "support.actor")


class Log(Silent):
    """Records all events of a build as tuples; `on` is called with each event."""

    def __init__(self, on=lambda event: None):
        self.events, self.on = [], on

    def _note(self, *event):
        self.events.append(event)
        self.on(event)

    def started(self, step, stage, number, of, reason):
        self._note("started", step)

    def advanced(self, step, done, total, figures):
        self._note("advanced", step, dict(figures))

    def printed(self, step, line):
        self._note("printed", step, line)

    def finished(self, step, seconds, skipped, metrics):
        self._note("finished", step)

    def failed(self, step, reason, running):
        self._note("failed", step, reason, running)


def actor(name, **config):
    return step(name, stage="actor", **config)


def test_independent_steps_run_concurrently_and_others_after_their_inputs(tmp_path):
    """Each of the two steps ends only after the other has started."""
    files = {name: str(tmp_path / name) for name in ("left", "right")}
    pair = [actor(name, arrive=file, wait_for=list(files.values())) for name, file in files.items()]
    after = step("after", inputs={"l": "left", "r": "right"})
    log = Log()
    report = build(recipe(after, *pair), tmp_path / "runs", jobs=2, progress=log)
    assert [row["name"] for row in report["steps"]] == ["left", "right", "after"]
    events = [event for event in log.events if event[0] in ("started", "finished")]
    assert events[:2] == [("started", "left"), ("started", "right")]
    assert sorted(events[2:4]) == [("finished", "left"), ("finished", "right")]
    assert events[4:] == [("started", "after"), ("finished", "after")]
    left, right, last = (row["metrics"]["pid"] for row in report["steps"])
    assert left != right
    assert last in (left, right)  # a worker runs several steps in turn
    assert not {left, right} & {os.getpid()}
    assert not any(Path(f"/proc/{pid}").exists() for pid in (left, right))
    assert report["build_seconds"] == pytest.approx(sum(row["seconds"] for row in report["steps"]), abs=0.01)


def test_threads_depend_only_on_recipe_machine_and_jobs(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "usable_threads", lambda: 7)
    steps = [step("a"), step("b"), step("c", inputs={"a": "a"})]
    for jobs, threads in ((1, 7), (2, 3), (5, 3)):  # at most two processes, because two steps can run concurrently
        report = build(recipe(*steps), tmp_path / str(jobs), jobs=jobs)
        manifests = [artifact.read_manifest(tmp_path / str(jobs) / "small" / name) for name in "abc"]
        assert [m.environment["threads"] for m in manifests] == [threads] * 3
        assert len({row["metrics"]["pid"] for row in report["steps"]}) == min(jobs, 2)
    # libraries in a worker see the same number of threads
    assert {row["metrics"]["usable_threads"] for row in report["steps"]} == {min(3, len(os.sched_getaffinity(0)))}


def test_steps_run_one_at_a_time_where_nothing_else_is_possible(tmp_path, monkeypatch):
    def at_once(*steps, jobs=None):
        return build_module._parallel(recipe(*steps), jobs)

    pair, chain = (step("a"), step("b")), (step("a"), step("b", inputs={"a": "a"}))
    monkeypatch.setattr(build_module, "_has_gpu", lambda: False)
    assert at_once(*pair, jobs=2) == 2
    assert at_once(*pair, jobs=1) == 1
    assert at_once(*chain, jobs=2) == 1
    monkeypatch.setattr(build_module, "usable_threads", lambda: 4)
    assert at_once(*pair) == 2
    monkeypatch.setattr(build_module, "_has_gpu", lambda: True)
    assert at_once(*pair) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert at_once(*pair, jobs=2) == 1


def test_bytes_do_not_depend_on_jobs_or_kills(tmp_path):
    steps = [step("a", steps=8), step("b", steps=8), step("c", inputs={"w": "a"}, steps=8)]
    steps.append(step("d", inputs={"x": "b", "y": "c"}, steps=8))
    path = write_recipe(tmp_path, *steps)
    build(parse_recipe(path.read_text(), "small", tmp_path), tmp_path / "calm", jobs=1)
    for moment in (r"advanced b 3", r"finished \w+ False", r"started d", r"advanced d 5"):
        assert finish(start(path, tmp_path / "stormy", jobs=2, kill_at=moment))[0] == -signal.SIGKILL
    code, _, err = finish(start(path, tmp_path / "stormy", jobs=2))
    assert (code, err) == (0, "")
    assert contents(tmp_path / "stormy") == contents(tmp_path / "calm")


def test_workers_of_a_killed_build_end_and_release_the_folder(tmp_path):
    path = write_recipe(tmp_path, step("a", steps=100_000, delay=0.05), step("b", steps=100_000, delay=0.05))
    process = start(path, tmp_path / "runs", jobs=2)
    seen = set()
    while len(seen) < 2:
        line = process.stdout.readline().split()
        if line[0] == "advanced":
            seen.add(line[1])
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    lock = tmp_path / "runs/small/.lock"
    with pytest.raises(BlockingIOError), exclusive_lock(lock):
        pass
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in children))
    with exclusive_lock(lock):
        pass


def test_killed_worker_ends_the_build_and_names_its_step(tmp_path):
    steps = [actor("a", wait_for=["nothing"]), step("b")]
    pids, seen = [], set()

    def kill(event):
        if event[:2] == ("advanced", "a"):
            pids.append(event[2]["pid"])
            seen.add("a")
        elif event == ("finished", "b"):
            seen.add("b")
        if seen == {"a", "b"}:
            seen.clear()
            os.kill(pids[0], signal.SIGKILL)

    with pytest.raises(CogumiError) as caught:
        build(recipe(*steps), tmp_path, jobs=2, progress=Log(kill))
    message = str(caught.value)
    assert message.startswith("step 'a': its process was killed by SIGKILL, as the system does when memory runs out")
    assert message.endswith("run the same command again to continue: finished steps are kept")
    assert artifact.verify(tmp_path / "small/b")
    assert not (tmp_path / "small/a/manifest.json").exists()


def test_exit_status_of_a_worker_is_reported(tmp_path):
    with pytest.raises(CogumiError, match=r"^step 'a': its process ended with exit status 3; run the same command"):
        build(recipe(actor("a", exits=3), step("b")), tmp_path, jobs=2)


@pytest.mark.parametrize("kind", ["gate", "stage"])
def test_after_a_failure_running_steps_finish_and_no_step_starts(tmp_path, kind):
    """The slow step ends only after the failure has been reported."""
    reported = tmp_path / "told"
    gate = {"metric": "score", "at_least": 0.6}
    bad = step("bad", gates=[gate]) if kind == "gate" else step("bad", fail=True)
    steps = [
        actor("slow", wait_for=[str(reported)]),
        bad,
        step("never", inputs={"w": "slow"}),
        step("nor", inputs={"w": "bad"}),
    ]

    def tell(event):
        if event[0] == "failed":
            reported.touch()

    log = Log(tell)
    with pytest.raises(GateError if kind == "gate" else TrainingError, match=r"^step 'bad'"):
        build(recipe(*steps), tmp_path / "runs", jobs=2, progress=log)
    (failed,) = [event for event in log.events if event[0] == "failed"]
    assert failed[1] == "bad"
    assert failed[2].startswith("step 'bad'")
    assert failed[3] == ["slow"]
    assert log.events[-1] == ("finished", "slow")
    home = tmp_path / "runs/small"
    assert artifact.verify(home / "slow")
    assert not (home / "never").exists()
    assert not (home / "nor").exists()
    assert (home / "bad/manifest.json").exists() == (kind == "gate")
    again = build(recipe(steps[0], step("bad"), *steps[2:]), tmp_path / "runs", jobs=2)
    assert [row["skipped"] for row in again["steps"]] == [True, kind == "gate", False, False]


def test_unexpected_error_keeps_its_type_and_the_workers_traceback(tmp_path):
    with pytest.raises(ZeroDivisionError) as caught:
        build(recipe(actor("a", divide_by=0), step("b")), tmp_path, jobs=2)
    assert "actor.py" in caught.value.__notes__[0]


def test_output_of_a_step_is_forwarded(tmp_path):
    log = Log()
    build(recipe(actor("a", prints="50%\r100%\nhello\n"), step("b")), tmp_path, jobs=2, progress=log)
    assert [event for event in log.events if event[0] == "printed"] == [
        ("printed", "a", "100%"),
        ("printed", "a", "hello"),
    ]


def test_step_waits_while_memory_is_short(tmp_path, monkeypatch):
    monkeypatch.setattr("cogumi.pipeline.executors.local.available_memory", lambda: 1000)
    log = Log()
    build(recipe(step("a"), step("b"), step("c")), tmp_path, jobs=3, progress=log)
    events = [event[:2] for event in log.events if event[0] != "advanced"]
    assert events == [(what, name) for name in "abc" for what in ("started", "finished")]


def test_full_disk_in_a_worker_is_reported_in_one_line(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(CogumiError, match=r"^step 'b': the disk is full while writing .*finished steps are kept"):
        build(recipe(step("a"), step("b", writer="full")), tmp_path, jobs=2)


def test_memory_of_a_step_is_measured_in_its_process(tmp_path):
    """The memory of a worker does not include that of its parent process."""
    ballast = b"x" * (400 << 20)
    build(recipe(step("a"), step("b")), tmp_path, jobs=2)
    peak = artifact.read_manifest(tmp_path / "small/a").environment["peak_rss_bytes"]
    assert 5 << 20 < peak < len(ballast)


def test_close_ends_running_steps(tmp_path):
    """As after Ctrl-C."""

    class Stop(KeyboardInterrupt):
        pass

    pids = []

    def stop(event):
        if event[0] == "advanced":
            pids.append(event[2]["pid"])
            raise Stop

    steps = [actor(name, wait_for=["nothing"]) for name in "ab"]
    with pytest.raises(Stop):
        build(recipe(*steps), tmp_path, jobs=2, progress=Log(stop))
    assert not Path(f"/proc/{pids[0]}").exists()
    with closing(LocalProcesses(2, 0)) as executor:
        assert executor.has_room(1 << 60)  # no step is running
