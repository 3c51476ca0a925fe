"""The missing capabilities of each engine with their reasons, and a marker for the capabilities that a test needs."""

import pytest

REMOTE = {
    "refuses beforehand": "only the server knows its context and vocabulary, so its refusal comes with the first event",
    "full entropy": "servers tell a few best tokens, which give a lower bound of the entropy",
    "end token": "chat completions tell no log-probability of the end token, so it is no Token",
    "hidden states": "no server tells them",
    "grammars": "OpenAI's API knows no grammars",
}
GAPS = {
    "llama": {},
    "torch": {"schemas": "refused with its reason", "grammars": "refused with its reason"},
    "served": REMOTE,
    "foreign": REMOTE
    | {
        "exact tokens": "its streams lose parts of characters, and then tell the last token twice",
        "usage": "its streams count no tokens",
        "echo": "it takes no prompt as ids, and pairs an echoed token with the wrong position's distribution",
        "embeddings": "it serves either text or embeddings",
        "status": "it answers 200 before it looks at the request, then breaks off without a reason",
        "schemas": "its response_format knows no json_schema",
        "penalties": "it also counts the prompt's tokens",
    },
}


def engines(*needs):
    """Run a test on every engine with these capabilities; skip the others with the reason."""

    def marks(kind):
        lacking = [GAPS[kind][need] for need in needs if need in GAPS[kind]]
        return [pytest.mark.skip(reason="; ".join(lacking))] if lacking else []

    assert set(needs) <= {need for gaps in GAPS.values() for need in gaps}
    return pytest.mark.parametrize("engine", [pytest.param(kind, marks=marks(kind)) for kind in GAPS], indirect=True)
