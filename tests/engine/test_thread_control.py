"""The number of threads follows the faster one, on a machine that is simulated."""

from cogumi.engine.llama.thread_control import SHARE, SMALL, ThreadControl


def run(control, passes, seconds, tokens=8):
    """The threads that the control chose; `seconds` maps threads to the time of a pass."""
    chosen = []
    for _ in range(passes):
        threads = control.choose(tokens)
        control.observe(threads, tokens, seconds[threads])
        chosen.append(threads)
    return chosen


QUIET, BUSY = {2: 1.0, 1: 1.8}, {2: 40.0, 1: 1.9}


def test_one_thread_is_never_changed():
    assert run(ThreadControl(1), 300, {1: 1.0}) == [1] * 300


def test_a_quiet_machine_uses_all_threads_from_the_second_pass_on():
    chosen = run(ThreadControl(2), 1000, QUIET)
    assert chosen[:2] == [1, 2]
    assert chosen[1:].count(1) <= 1 + 2 * SHARE * 1000


def test_a_busy_machine_pays_for_few_trials():
    """The slower a trial, the longer the time until the next one."""
    chosen = run(ThreadControl(2), 5000, BUSY)
    assert chosen.count(2) >= 3
    spent = sum(BUSY[n] for n in chosen)
    assert chosen.count(2) * BUSY[2] < 2 * SHARE * spent


def test_one_slow_pass_is_enough_to_change_when_other_work_begins():
    control = ThreadControl(2)
    run(control, 500, QUIET)
    assert run(control, 40, BUSY) == [2] + [1] * 39


def test_all_threads_come_back_when_the_machine_is_quiet_again():
    control = ThreadControl(2)
    run(control, 100, QUIET)
    run(control, 400, BUSY)
    chosen = run(control, int(2 * BUSY[2] / SHARE), QUIET)
    assert 2 in chosen
    assert chosen[-10:] == [2] * 10


def test_sizes_are_compared_with_themselves_only():
    """A pass of many tokens takes long with any number of threads: it must not look like a busy machine."""
    control = ThreadControl(2)
    spent = best = 0.0
    for i in range(400):
        tokens = 128 if i % 3 == 0 else 4
        threads = control.choose(tokens)
        seconds = QUIET[threads] * tokens
        control.observe(threads, tokens, seconds)
        spent, best = spent + seconds, best + QUIET[2] * tokens
    assert spent < (1 + 2 * SHARE) * best


def test_long_passes_are_no_trials():
    control = ThreadControl(2)
    assert run(control, 50, BUSY, tokens=SMALL + 1) == [1] * 50
