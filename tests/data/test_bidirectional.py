"""Stage `bidirectional`: reverses of pairs, which never straddle two sets."""

import pytest

from cogumi.core.errors import DataError
from cogumi.core.types import Message
from cogumi.data.bidirectional import ASKED
from cogumi.data.examples import POOL, SPLITS, read_examples, split_path
from support.pools import pool, row, rows, run

LONG = "Owls hunt at night because their eyes and ears work well in the dark, and few others do."


def test_a_pair_is_followed_by_its_reverse(tmp_path):
    given = [row("Why do owls hunt at night?", LONG, 1, "birds", 2, check={"kind": "exact"}), row("2 + 2?", "4", 2)]
    made = run("bidirectional", {"pool": pool(tmp_path / "pool", given)}, tmp_path / "out")
    first, reverse, last = read_examples(made.path / POOL)
    assert (first.messages, first.answer, first.check) == (given[0].messages, LONG, {"kind": "exact"})
    assert reverse.messages == (Message("user", ASKED.format(answer=LONG)),)
    assert (reverse.answer, reverse.domain, reverse.difficulty) == ("Why do owls hunt at night?", "birds", 2)
    assert reverse.meta["split_group"] == first.meta["split_group"]
    assert reverse.meta["reverse_of"] == first.id
    assert "check" not in reverse.meta
    assert last == given[1]
    assert made.metrics == {"rows": 3, "reversed": 1, "without": {"short answer": 1}}


def test_no_set_holds_the_reverse_of_a_pair_of_another(tmp_path):
    given = rows(*[(f"Question {i}?", f"{LONG} Number {i}.") for i in range(200)])
    both = run("bidirectional", {"pool": pool(tmp_path / "pool", given)}, tmp_path / "both")
    made = run("split", {"pool": both}, tmp_path / "sets")
    sets = {name: read_examples(split_path(made.path, name)) for name in SPLITS}
    assert sum(map(len, sets.values())) == 400
    for examples in sets.values():
        ids = {e.id for e in examples}
        assert all(e.meta["reverse_of"] in ids for e in examples if "reverse_of" in e.meta)


def test_share_is_a_share_and_depends_on_the_seed(tmp_path):
    made = pool(tmp_path / "pool", rows(*[(f"Question {i}?", f"{LONG} Number {i}.") for i in range(400)]))
    counts = [
        run("bidirectional", {"pool": made}, tmp_path / f"out{seed}", seed=seed, share=0.25).metrics["reversed"]
        for seed in (1, 2)
    ]
    assert all(70 <= count <= 130 for count in counts)
    one, other = (read_examples(tmp_path / f"out{seed}" / POOL) for seed in (1, 2))
    assert one != other


def test_rows_without_a_reverse_are_counted_and_none_at_all_is_an_error(tmp_path):
    turns = row("And at noon?", LONG, 1)
    several = type(turns)(
        turns.id, "d", 0, (Message("user", "Hi"), Message("assistant", "Ho"), *turns.messages), LONG, "f:1", {}
    )
    unanswerable = row("Who?", "I don't know.", 2, check={"kind": "abstain"})
    made = pool(tmp_path / "pool", [several, unanswerable, row("2 + 2?", "4", 3)])
    with pytest.raises(DataError, match=r"no row has a reverse: of 3 rows 1 have: .*; lower `words`"):
        run("bidirectional", {"pool": made}, tmp_path / "out")
