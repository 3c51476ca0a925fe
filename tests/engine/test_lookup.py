"""Prompt lookup equals a naive search through the whole sequence."""

from hypothesis import given
from hypothesis import strategies as st

from cogumi.engine.llama.speculative.lookup import Lookup

few_ids = st.lists(st.integers(0, 3), max_size=40)  # few distinct ids, so that repeats of all lengths occur


def reference_lookup(ids: list[int], k: int, longest: int, shortest: int) -> list[int]:
    """Reference: the longest match, then the latest one; a match that overlaps its continuation is repeated."""
    for n in range(min(longest, len(ids)), shortest - 1, -1):
        for at in range(len(ids) - 1, n - 1, -1):
            if ids[at - n : at] == ids[-n:]:
                proposal: list[int] = []
                while len(proposal) < k:
                    proposal.append((ids + proposal)[at + len(proposal)])
                return proposal
    return []


@given(few_ids, few_ids, st.integers(0, 12), st.integers(1, 3), st.integers(0, 3))
def test_proposals_equal_the_reference(prompt, answer, k, shortest, more):
    longest = shortest + more
    lookup = Lookup(prompt, longest, shortest)
    assert lookup.propose(k) == reference_lookup(prompt, k, longest, shortest)
    for i, id in enumerate(answer):
        lookup.append(id)
        assert lookup.propose(k) == reference_lookup(prompt + answer[: i + 1], k, longest, shortest)


@given(st.lists(st.integers(0, 50_000), min_size=1, max_size=8, unique=True), st.integers(0, 30))
def test_repeating_text_is_proposed_to_full_length(loop, k):
    lookup = Lookup(loop * 3)
    assert lookup.propose(k) == (loop * k)[:k]


def test_longest_match_is_used_then_the_latest():
    assert Lookup([1, 2, 3, 9, 7, 2, 3, 8, 1, 2, 3]).propose(2) == [9, 7]
    assert Lookup([2, 3, 9, 7, 2, 3, 8, 5, 2, 3]).propose(2) == [8, 5]


def test_nothing_is_proposed_without_a_repeat():
    assert Lookup([]).propose(5) == Lookup([1]).propose(5) == Lookup([1, 2, 3, 4, 3]).propose(5) == []
