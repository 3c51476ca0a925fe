"""Prefix reuse as pure functions: the common prefix of two texts, and the choice of a sequence for a prompt."""

from itertools import takewhile

from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.text import common_prefix
from cogumi.engine.llama.prefix_reuse import CachedSequence, choose_sequence

ids = st.lists(st.integers(0, 2), max_size=30)


@given(ids, ids, ids)
def test_common_prefix_is_the_longest(start, one, two):
    one, two = start + one, start + two
    direct = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(one, two, strict=False))))
    assert common_prefix(one, two) == common_prefix(two, one) == direct >= len(start)


def test_conversation_continues_in_its_own_sequence():
    free = {0: CachedSequence([1, 2, 3, 4, 5, 6], used=1), 3: CachedSequence([1, 2, 9, 9], used=7), 5: CachedSequence()}
    assert choose_sequence([1, 2, 3, 4, 5, 6, 7, 8], free) == (0, 6)
    assert choose_sequence([1, 2, 9, 9, 9], free) == (3, 4)


def test_unrelated_prompts_take_the_least_recently_used_sequence():
    free = {0: CachedSequence([1, 2, 3], used=5), 3: CachedSequence([1, 4], used=2), 4: CachedSequence([9], used=9)}
    assert choose_sequence([1, *range(20, 60)], free) == (3, 1)
    assert choose_sequence([7] * 10, free | {6: CachedSequence()}) == (6, 0)
    assert choose_sequence([7] * 10, {4: CachedSequence([7] * 30, used=1)}) == (4, 10)


@given(
    ids.filter(len), st.dictionaries(st.integers(0, 7), st.builds(CachedSequence, ids, st.integers(0, 99)), min_size=1)
)
def test_kept_part_is_always_a_common_prefix(prompt, free):
    sequence, kept = choose_sequence(prompt, free)
    assert free[sequence].ids[:kept] == prompt[:kept]


def test_shorter_cache_is_used_first_where_several_share_the_prefix():
    free = {1: CachedSequence([1, 2, 3, 4, 5], used=9), 2: CachedSequence([1, 2, 3], used=1)}
    assert choose_sequence([1, 2, 3], free) == choose_sequence([1, 2, 3, 7], free) == (2, 3)
    assert choose_sequence([1, 2, 3, 4], free) == (1, 4)
