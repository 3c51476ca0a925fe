"""The HTTP server's completions, embeddings and tokenizer endpoints, driven by the real `openai` package."""

import json

import numpy as np
import openai
import pytest

from support.serve import ByteTokenizer, raw


def complete(client, prompt, **options):
    return client.completions.create(model="cogumi:base+code", prompt=prompt, **options)


def test_completions_take_every_form_of_prompt(client, engine):
    ids = list(b"echo ab")
    for prompt, n in (("echo ab", 1), (ids, 1), (["echo ab"] * 2, 2), ([ids] * 3, 3)):
        completion = complete(client, prompt)
        assert completion.object == "text_completion"
        assert [(c.index, c.text, c.finish_reason) for c in completion.choices] == [(i, "ab", "stop") for i in range(n)]
        assert completion.choices[0].logprobs is None
        assert completion.usage.prompt_tokens == 10 * n
        assert engine.requests[-1].prompt == ("echo ab" if "echo ab" in (prompt, prompt[0]) else tuple(ids))
    assert (engine.requests[-1].max_tokens, engine.requests[-1].echo) == (16, False)


def test_each_prompt_has_its_own_choices(client, engine):
    completion = complete(client, ["echo a", "echo b"], n=2, seed=7, temperature=1, stop="x", logit_bias={"5": 1})
    assert [(c.index, c.text) for c in completion.choices] == [(0, "a"), (1, "a"), (2, "b"), (3, "b")]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (20, 8)  # two prompts
    assert sorted((r.prompt, r.seed) for r in engine.requests[-4:]) == [
        ("echo a", 7), ("echo a", 8), ("echo b", 7), ("echo b", 8)
    ]  # fmt: skip
    assert (engine.requests[-1].stop, engine.requests[-1].logit_bias) == (("x",), {5: 1.0})


def test_log_likelihoods_for_lm_eval(client, engine):
    """With the payload and the greedy check of lm-evaluation-harness."""
    ids = list("echo é".encode())
    completion = complete(client, [ids], temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    assert engine.requests[-1].echo
    choice = completion.choices[0]
    assert choice.text == "echo éé"
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(ids) + 1 + 1
    assert told.tokens[:6] == [*"echo ", "bytes:\\xc3"]
    assert told.tokens[-1] == ""  # the end token
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert told.text_offset[:7] == [0, 1, 2, 3, 4, 5, 5]
    greedy = [
        value == max(top.values()) for value, top in zip(told.token_logprobs[1:], told.top_logprobs[1:], strict=True)
    ]
    assert all(greedy)


def test_logprobs_of_completions(client):
    told = complete(client, "echo b", logprobs=2).choices[0].logprobs
    assert told.tokens == ["b", ""]
    assert told.top_logprobs[0] == {"a": -0.5, "b": -1.5}
    assert told.token_logprobs[0] == -1.5  # the same float as in the top logprobs
    assert told.text_offset == [6, 7]
    assert complete(client, "echo b", logprobs=0).choices[0].logprobs.top_logprobs[0] == {"b": -0.5}
    assert complete(client, "echo b", echo=True).choices[0].text == "echo bb"


def test_completions_stream(client):
    chunks = list(complete(client, "echo abc", stream=True, echo=True, stream_options={"include_usage": True}))
    assert len({(c.id, c.created, c.model, c.object) for c in chunks}) == 1
    assert "".join(c.choices[0].text for c in chunks[:-1]) == "echo abcabc"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * 3 + ["stop"]
    assert all(c.usage is None for c in chunks[:-1])
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], 14)
    told = [c.choices[0].logprobs for c in complete(client, "echo ab", stream=True, logprobs=1)]
    assert [(t.tokens, t.text_offset) for t in told if t] == [(["a"], [7]), (["b"], [8])]
    with pytest.raises(openai.BadRequestError, match="512"):
        complete(client, "long", stream=True)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [[]]},
        {"prompt": ["a", [1]]},
        {"prompt": [1.5]},
        {"prompt": [True]},
        {"prompt": [-1]},
        {"prompt": None},
        {"prompt": 5},
        {"max_tokens": 0},
        {"logprobs": 21},
        {"suffix": "x"},
        {"best_of": 3},
        {"echo": True, "logprobs": 1, "stream": True},
    ],
)
def test_bad_completions_are_refused(port, change):
    body = {"model": "cogumi", "prompt": "echo a"} | change
    status, _, data = raw(port, "POST", "/v1/completions", json.dumps(body))
    assert status == 400
    assert json.loads(data)["error"]["message"]


def test_embeddings(client, port):
    inputs = ("abc", ["abc", "d"], [97, 98], [[97], [98, 99, 100]])
    for texts, lengths in zip(inputs, ([3], [3, 1], [2], [1, 3]), strict=True):
        answer = client.embeddings.create(model="cogumi", input=texts)  # the SDK requests base64
        plain = client.embeddings.create(model="cogumi", input=texts, encoding_format="float")
        assert [(d.index, d.embedding) for d in answer.data] == [(d.index, d.embedding) for d in plain.data]
        assert [d.embedding for d in plain.data] == [[float(n), float(np.float32(0.1))] for n in lengths]
        assert answer.usage.total_tokens == sum(lengths)
    for wrong in ({"input": []}, {"input": "a", "dimensions": 7}, {"input": "a", "encoding_format": "hex"}, {}):
        assert raw(port, "POST", "/v1/embeddings", json.dumps({"model": "cogumi"} | wrong))[0] == 400
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="gpt-4o", input="a")


def test_tokenizer_endpoints(port):
    def post(path, body):
        status, _, data = raw(port, "POST", path, json.dumps(body))
        return status, json.loads(data)

    assert json.loads(raw(port, "GET", "/tokenizer_info")[2]) == ByteTokenizer.settings
    assert post("/tokenize", {"prompt": "hé", "add_special_tokens": False}) == (200, {"tokens": [104, 195, 169]})
    assert post("/detokenize", {"tokens": [104, 195, 169, 256]}) == (200, {"prompt": "hé"})
    assert post("/tokenize", {"prompt": "a", "model": "cogumi:fast"}) == (200, {"tokens": [97]})
    assert post("/tokenize", {"prompt": "a", "model": "nope"})[0] == 404
    assert post("/detokenize", {"tokens": [-1]})[0] == 400
