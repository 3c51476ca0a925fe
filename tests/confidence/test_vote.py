"""Self-consistency: final answers are extracted from texts, counted, and sampled in parallel from a real engine."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogumi.cascade.self_consistency import Sampling, finish, gather, vote
from cogumi.confidence.vote import Answer, final_answer, tally
from cogumi.core.errors import RequestError
from cogumi.core.types import Message, Request
from cogumi.engine.llama.engine import LlamaEngine
from support.engines import pico
from support.waiting import PATIENCE

QUESTION = Request(messages=(Message("user", "Is it so?"),), max_tokens=12, seed=5)
YES_OR_NO = 'root ::= "yes" | "no"'


@pytest.mark.parametrize(
    "texts",
    [
        ("42", " 42. ", "42.0", "+42", "The answer is 42", "6 * 7 = 42.", "$42", "42 apples", "Answer: **42**"),
        ("1,000", "1e3", "First 500. Then twice as much, so 1000 in all.", "\\boxed{1000}", "Let us see.\n#### 1000"),
        ("-0", "0", "0.00"),
        ("\u22125", "-5", "x = -5"),
        ("B", "(B)", "B) the second", "The answer is B."),
        ("Paris", "paris.", ' "PARIS" ', "Answer: Paris"),
        ("I don't know.", "i don\u2019t know"),
        (
            '{"tool":"f","args":{"a":1}}',
            '[{"args": {"a": 1.0}, "tool": "f"}]',
            '```json\n{"tool":"f","args":{"a":1}}\n```',
        ),
        ("def f(x):\n    return x*2", "```python\ndef f(x):  # twice\n\n  return x * 2\n```"),
    ],
)
def test_equivalent_answers_compare_equal(texts):
    assert len({final_answer(text) for text in texts}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("42", "43"),
        ("5", "-5"),
        ("10:30", "30"),
        ("3/4", "4"),
        ("Vienna in 1815", "Paris in 1815"),
        ("12345678901234567890123456789012", "12345678901234567890123456789013"),
        ('{"a": true}', '{"a": 1}'),
        ('{"a": "1"}', '{"a": 1}'),
        ("def f(x):\n    return x * 2", "def f(x):\n    return x * 3"),
        ("def f(x):\n  if x:\n    a()\n  b()", "def f(x):\n  if x:\n    a()\n    b()"),
        ("A", "B"),
        ("yes", "no"),
    ],
)
def test_different_answers_compare_unequal(one, other):
    assert final_answer(one) != final_answer(other)


@pytest.mark.parametrize("text", ["", "  ", "\n\t"])
def test_text_without_a_final_answer_gives_none(text):
    assert final_answer(text) is None


@given(st.text())
def test_any_text_is_parsed_without_an_error(text):
    answer = final_answer(text)
    assert (answer is None) == (not text.strip())
    assert final_answer(text + " \n") == answer or answer.kind == "code"  # a space may end an unfinished string


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "1 ",
        "(",
        "[",
        "def f(",
        "answer: ",
        "answer    ",
        "\n",
        "```",
        "\\boxed{",
        "9",
        "1e",
        '{"a":',
        "\x00",
        "import x\n'",
        "\ud800",
    ],
)
@pytest.mark.timeout(PATIENCE)
def test_parsing_time_is_not_quadratic_in_the_length(unit):
    """A million characters are parsed in about a second; quadratic time would be hours."""
    final_answer((unit * 1_000_000)[:1_000_000])


answers = st.one_of(st.none(), st.sampled_from([Answer("text", c) for c in "abcd"] + [Answer("number", "1")]))
ballots = st.lists(st.tuples(answers, st.floats(1, 100, allow_nan=False)), min_size=1, max_size=10)


@given(ballots, st.randoms())
def test_result_does_not_depend_on_the_order_of_paths(rows, random):
    def outcome(rows):
        counted = tally([a for a, _ in rows], [p for _, p in rows])
        return counted.agreement, None if counted.winner is None else rows[counted.winner]

    shuffled = random.sample(rows, len(rows))
    assert outcome(rows) == outcome(shuffled)


@given(ballots)
def test_agreement_is_the_share_of_the_largest_group(rows):
    voted = [a for a, _ in rows]
    counted = tally(voted, [p for _, p in rows])
    largest = max((voted.count(a) for a in voted if a), default=0)
    assert counted.agreement == largest / len(rows)
    assert 0 <= counted.agreement <= 1
    if counted.winner is not None:
        assert voted.count(voted[counted.winner]) == largest
        assert rows[counted.winner][1] == min(p for a, p in rows if a == voted[counted.winner])
    else:
        assert largest == 0 or (largest == 1 < len(rows))


def test_tie_is_broken_by_the_lowest_perplexity():
    a, b = Answer("text", "a"), Answer("text", "b")
    assert tally([a, b, a, b, None], [3.0, 2.0, 4.0, 5.0, 1.0]).winner == 1
    assert tally([a, b, a, b, None], [3.0, 3.5, 2.0, 5.0, 1.0]).winner == 2


def test_no_winner_when_no_two_paths_agree():
    assert tally([Answer("text", c) for c in "abcde"], [1.0] * 5).winner is None
    assert tally([None] * 5, [1.0] * 5) == tally([None], [1.0])
    assert tally([Answer("text", "a"), None, None], [1.0] * 3).winner is None


@pytest.fixture(scope="module")
def engine():
    made = LlamaEngine(pico().base_q8, slots=4, context=128, threads=1, lookup=False)
    yield made
    made.close()


def test_vote_over_a_real_engine(engine):
    request = replace(QUESTION, grammar=YES_OR_NO)
    found = finish(vote(engine, request, paths=7, sampling=Sampling(temperature=50.0)))
    parsed = [reply.text for reply in found.replies]
    assert set(parsed) == {"yes", "no"}
    assert found.text == max(set(parsed), key=parsed.count) == found.winner.text
    assert found.agreement == parsed.count(found.text) / 7
    assert found.usage.completion_tokens == sum(len(reply.tokens) for reply in found.replies)
    again = finish(vote(engine, request, paths=7, sampling=Sampling(temperature=50.0)))
    assert [reply.text for reply in again.replies] == parsed


def test_each_path_and_each_request_has_its_own_seed():
    seeds = {r.seed for seed in range(50) for r in Sampling().requests(replace(QUESTION, seed=seed), 10)}
    assert len(seeds) == 500
    assert {r.seed for r in Sampling().requests(replace(QUESTION, seed=None), 3)} == {None}


class RecordedGeneration:
    """A generation that records whether it was closed."""

    def __init__(self, events):
        self.events, self.closed = events, False

    def __iter__(self):
        return self.events

    def close(self):
        self.closed = True
        self.events.close()


class RecordingEngine:
    """An engine that records its requests and generations."""

    def __init__(self, engine):
        self.engine, self.begun = engine, []

    def generate(self, request):
        self.begun.append(RecordedGeneration(self.engine.generate(request)))
        return self.begun[-1]


def test_all_paths_are_submitted_before_the_first_is_read(engine):
    """So that all paths run in one batch."""
    watch = RecordingEngine(engine)
    work = gather(watch, Sampling().requests(QUESTION, 4))
    assert next(work) is None
    assert len(watch.begun) == 4
    assert len(finish(work)) == 4


def test_closing_cancels_every_path(engine):
    watch = RecordingEngine(engine)
    work = vote(watch, replace(QUESTION, max_tokens=60, logit_bias={engine.tokenizer.eos: -100.0}), paths=4)
    next(work)
    assert not any(events.closed for events in watch.begun)
    work.close()
    assert [events.closed for events in watch.begun] == [True] * 4


def test_truncated_and_empty_answers_do_not_vote(engine):
    cut = finish(vote(engine, replace(QUESTION, max_tokens=2, logit_bias={engine.tokenizer.eos: -100.0})))
    empty = finish(vote(engine, replace(QUESTION, logit_bias={engine.tokenizer.eos: 100.0})))
    for found in (cut, empty):
        assert (found.winner, found.text, found.agreement, len(found.replies)) == (None, None, 0.0, 5)


def test_cancelled_paths_do_not_vote():
    engine = LlamaEngine(pico().base_q8, slots=2, context=128, threads=1, lookup=False)
    work = vote(engine, replace(QUESTION, max_tokens=100, logit_bias={engine.tokenizer.eos: -100.0}))
    next(work)
    engine.close()
    found = finish(work)
    assert (found.winner, found.agreement) == (None, 0.0)
    assert {reply.finish_reason for reply in found.replies} <= {"cancelled", "length"}


@pytest.mark.parametrize("paths", [0, 2, 11])
def test_number_of_paths_outside_three_to_ten_is_refused(engine, paths):
    with pytest.raises(RequestError, match="3 to 10"):
        finish(vote(engine, QUESTION, paths=paths))


def test_request_errors_of_the_engine_are_raised(engine):
    with pytest.raises(RequestError, match="context"):
        finish(vote(engine, replace(QUESTION, max_tokens=1000)))
