"""`core.amounts`: amounts of memory in human notation are parsed to bytes."""

import pytest

from cogumi.core.amounts import parse_bytes
from cogumi.core.errors import RecipeError


def test_memory_sizes_are_parsed():
    assert parse_bytes("80GB") == 80 * 10**9
    assert parse_bytes("1.5 GiB") == 3 * 2**29
    for wrong in ("80", "GB", "80 gigabytes", "-1GB"):
        with pytest.raises(RecipeError, match="write it like 80GB"):
            parse_bytes(wrong)
