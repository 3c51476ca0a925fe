"""The number of threads follows the faster one, on a machine that is simulated."""

from cogumi.engine.llama.thread_control import PROBE_EVERY, ThreadControl


def run(control, passes, seconds, tokens=8):
    """The threads that the control chose; `seconds` maps threads to the time of a pass."""
    chosen = []
    for _ in range(passes):
        threads = control.choose()
        control.observe(threads, tokens, seconds[threads])
        chosen.append(threads)
    return chosen


QUIET, BUSY = {2: 1.0, 1: 1.8}, {2: 7.0, 1: 1.9}


def test_one_thread_is_never_changed():
    assert run(ThreadControl(1), 300, {1: 1.0}) == [1] * 300


def test_a_quiet_machine_keeps_all_threads_but_for_rare_trials():
    chosen = run(ThreadControl(2), 1000, QUIET)
    assert 1 in chosen
    assert chosen.count(1) <= 2 + 1000 / PROBE_EVERY


def test_a_busy_machine_changes_to_one_thread_within_a_few_passes():
    control = ThreadControl(2)
    run(control, 100, QUIET)
    chosen = run(control, 60, BUSY)
    assert chosen.count(2) <= 8
    assert chosen[-20:] == [1] * 20


def test_all_threads_come_back_when_the_machine_is_quiet_again():
    control = ThreadControl(2)
    run(control, 100, QUIET)
    run(control, 100, BUSY)
    chosen = run(control, 2 * PROBE_EVERY + 50, QUIET)
    assert chosen[-20:] == [2] * 20


def test_sizes_are_compared_with_themselves_only():
    """A pass of many tokens takes long with any number of threads: it must not look like a busy machine."""
    control = ThreadControl(2)
    chosen = []
    for i in range(400):
        tokens = 128 if i % 3 == 0 else 4
        threads = control.choose()
        control.observe(threads, tokens, QUIET[threads] * tokens)
        chosen.append(threads)
    assert chosen[20:].count(1) <= 6
