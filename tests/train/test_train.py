"""The stages `sft`, `draft` and `modifier` on pico models: batches, loss masks, learned behaviour and errors."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cogumi.core.errors import ArtifactError, TrainingError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import ABSTENTION, Artifact, Example, Message
from cogumi.data.examples import example_id, read_examples, split_path, write_examples
from cogumi.data.responses import Response, read_responses, write_responses
from cogumi.models.draft_heads import DraftModel
from cogumi.models.folders import Shape, build, load, locate
from cogumi.models.lora import LoraShape, attach
from cogumi.models.tokenization import HFTokenizer
from cogumi.train import draft, modifier, sft
from cogumi.train.batches import IGNORE, Order, collate, make_rows
from cogumi.train.failed_questions import with_usual_abstentions
from cogumi.train.loop import LoopConfig
from cogumi.train.losses import answer_loss, token_nats
from cogumi.train.muon import orthogonalise
from support import pico

TINY = {"hidden": 32, "layers": 1, "heads": 1, "feed_forward": 64}
LOOP = {"steps": 12, "batch": 8, "lr": 0.01, "muon_lr": 0.02, "evaluate_every": 6, "checkpoint_every": 4, "warmup": 2}


def context(seed=3):
    return Context(seed, 1, Path(), lambda done, total, figures: None)


def artifact(path, **metrics):
    return Artifact("test", path, "0", {}, metrics)


def example(question, answer, difficulty=1, domain="math"):
    messages = (Message("user", question),)
    return Example(example_id(domain, messages), domain, difficulty, messages, answer)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with examples (easy and hard sums), a tokenizer and the responses of a hypothetical base."""
    root = tmp_path_factory.mktemp("train")
    pico.make_tokenizer(root / "tokenizer")
    rows = [example(f"{a} plus {b}", str(a + b), 1 if a < 6 else 5) for a in range(10) for b in range(10)]
    for name in ("train", "selection", "fit", "threshold", "heldout"):
        write_examples(split_path(root / "data", name), rows if name == "train" else rows[::7])
    (root / "responses").mkdir()
    write_responses(
        root / "responses",
        [Response(e.id, e.answer if e.difficulty == 1 else "wrong", e.difficulty == 1, "", 0.5, 2, True) for e in rows],
    )
    return root


@pytest.fixture(scope="module")
def base(world):
    out = world / "base"
    out.mkdir()
    metrics = sft.run(sft.Config(shape=Shape(**TINY), loop=LoopConfig(**LOOP)), inputs(world), out, context())
    return out, metrics


def inputs(world, **more):
    found = {"examples": artifact(world / "data"), "tokenizer": artifact(world / "tokenizer")}
    return {**found, **{name: artifact(path) for name, path in more.items()}}


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=200), st.integers(1, 16), st.integers(0, 99), st.integers(0, 3)
)
@settings(max_examples=60, deadline=None)
def test_epoch_contains_every_row_once_and_is_deterministic(lengths, size, seed, number):
    order = Order(tuple(lengths), size, seed)
    batches = order.epoch(number)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == order.per_epoch
    assert batches == Order(tuple(lengths), size, seed).epoch(number)


def test_prompt_tokens_do_not_contribute_to_the_loss(world):
    """Assistant-only loss: changing the predictions of prompt tokens does not change gradients."""
    tokenizer = HFTokenizer.load(world / "tokenizer")
    rows = make_rows([example("3 plus 4", "7"), example("what is 20 plus 11", "31")], tokenizer, 64)
    batch = collate(rows, [0, 1])
    for row, labels in zip(rows, batch.labels.tolist(), strict=True):
        assert all(label == IGNORE for label in labels[: row.start])
        assert tuple(label for label in labels if label != IGNORE) == row.ids[row.start :]
        assert row.ids[-1] == tokenizer.eos
    model = build(Shape(**TINY), tokenizer, 0)
    hidden = model.model(input_ids=batch.ids).last_hidden_state
    hidden.retain_grad()
    token_nats(model.lm_head, hidden, batch.labels)[0].sum().backward()
    learned = hidden.grad.abs().sum(-1) > 0
    for r, row in enumerate(rows):
        assert learned[r].nonzero().flatten().tolist() == list(range(row.start - 1, len(row.ids) - 1))


def test_answer_loss_equals_the_models_likelihood(world):
    tokenizer = HFTokenizer.load(world / "tokenizer")
    rows = make_rows([example("3 plus 4", "7"), example("what is 20 plus 11", "31")], tokenizer, 64)
    model = build(Shape(**TINY), tokenizer, 0)
    loss, _ = answer_loss(model, collate(rows, [0, 1]))
    nats = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        nats += [-logits[i - 1, row.ids[i]].item() for i in range(row.start, len(row.ids))]
    assert float(loss) == pytest.approx(np.mean(nats), rel=1e-4)


@pytest.mark.parametrize("shape", [(3, 40, 16), (2, 16, 40), (1, 24, 24)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_training_lowers_the_loss_and_saves_a_model_that_loads(base, world):
    out, metrics = base
    curve = [figures["loss"] for _, figures in metrics["curve"]["selection"]]
    assert curve[-1] < math.log(512) - 1  # an untrained model is uniform over 512 tokens
    model = load(out)
    tokenizer = HFTokenizer.load(out)
    rows = make_rows([example("3 plus 4", "7")], tokenizer, 64)
    assert math.isfinite(float(answer_loss(model, collate(rows, [0]))[0]))
    assert metrics["model_sha256"] == sha256(out / "model.safetensors")


def test_draft_never_learns_hard_answers(world, base, tmp_path):
    """Hard questions have no answer label, whatever the base answered; easy ones have the answer of the base."""
    tokenizer = HFTokenizer.load(base[0])
    responses = read_responses(world / "responses")
    rows = [example("1 plus 1", "2"), example("7 plus 7", "14", difficulty=5)]
    for answers in ("base", "dataset"):
        config = draft.Config(easy_up_to=2, answers=answers)
        taught = draft.collate(draft.draft_rows(rows, responses, tokenizer, config), [0, 1])
        labels = taught.batch.labels
        assert tokenizer.decode([i for i in labels[0].tolist() if i != IGNORE]) == "2"
        assert (labels[1] == IGNORE).all()
        assert taught.easy.tolist() == [1.0, 0.0]
        assert taught.perplexity.tolist() == [pytest.approx(math.exp(0.25)), 0.0]


def test_difficulty_head_reads_the_last_prompt_token(world, base):
    tokenizer = HFTokenizer.load(base[0])
    model = DraftModel(build(Shape(**TINY), tokenizer, 0))
    rows = make_rows([example("1 plus 1", "2"), example("1 plus 1", "a much longer answer")], tokenizer, 64)
    batch = collate(rows, [0, 1])
    logits = model.easy_logit(model.hidden(batch.ids), batch.starts - 1)
    assert logits[0].item() == pytest.approx(logits[1].item(), abs=1e-5)


def test_draft_stage_separates_easy_from_hard(world, base, tmp_path):
    config = draft.Config(shape=Shape(**TINY), loop=LoopConfig(**{**LOOP, "steps": 60, "batch": 32}))
    found = inputs(world, responses=world / "responses", model=base[0])
    metrics = draft.run(config, found, tmp_path, context())
    assert metrics["difficulty_auroc"] > 0.9  # the first digit decides
    assert (tmp_path / "difficulty.safetensors").exists()
    assert (tmp_path / "curves.png").stat().st_size > 5_000
    assert load(tmp_path).config.hidden_size == 32


def test_modifier_is_trained_on_failures_only_and_the_base_is_unchanged(world, base, tmp_path):
    found = inputs(world, responses=world / "responses", model=base[0])
    before = sha256(base[0] / "model.safetensors")
    config = modifier.Config(domain="math", lora=LoraShape(rank=4), loop=LoopConfig(**{**LOOP, "muon_lr": None}))
    metrics = modifier.run(config, found, tmp_path, context())
    assert (metrics["asked"], metrics["failed"]) == (100, 40)
    assert metrics["base_sha256"] == before == sha256(base[0] / "model.safetensors")
    assert sorted(p.name for p in tmp_path.glob("adapter*")) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("failed", "unanswerable", "asked", "kept"),
    [
        (40, 20, (100, 20), 8),  # the base failed all that have no answer, but 40% of the others
        (100, 20, (100, 20), 20),
        (3, 20, (100, 20), 1),  # at least one
        (0, 20, (100, 20), 20),  # nothing else to learn
        (0, 20, (0, 20), 20),
        (40, 0, (100, 0), 0),
    ],
)
def test_a_modifier_sees_no_more_unanswerable_questions_than_its_domain_has(failed, unanswerable, asked, kept):
    answered = [example(f"{i} plus 1", str(i + 1)) for i in range(asked[0])]
    unknown = [
        replace(example(f"{i} plus what", ABSTENTION), id=f"u{i}", meta={"check": {"kind": "abstain"}})
        for i in range(asked[1])
    ]
    failures = [*answered[:failed], *unknown[:unanswerable]]
    found = with_usual_abstentions(failures, [*answered, *unknown], seed=1)
    assert [e for e in found if e.answerable] == answered[:failed]
    assert sum(not e.answerable for e in found) == kept
    assert found == [e for e in failures if e in found]  # in the order of the data


def test_rehearsal_adds_questions_that_the_base_answered(world, base, tmp_path):
    found = inputs(world, responses=world / "responses", model=base[0])
    loop = LoopConfig(**{**LOOP, "steps": 2, "evaluate_every": 2, "muon_lr": None})
    for rehearsal, added in ((0.2, 10), (0.8, 60)):
        config = modifier.Config(domain="math", rehearsal=rehearsal, lora=LoraShape(rank=4), loop=loop)
        metrics = modifier.run(config, found, tmp_path / str(added), context())
        assert (metrics["failed"], metrics["rehearsed"]) == (40, added)


def test_a_domain_without_failures_needs_no_modifier(world, base, tmp_path):
    found = inputs(world, responses=world / "responses", model=base[0])
    with pytest.raises(TrainingError, match="no training question of 'poetry' was answered"):
        modifier.run(modifier.Config(domain="poetry"), found, tmp_path, context())


def test_base_that_memorised_its_training_rows_is_named(world, base, tmp_path):
    rows = read_examples(split_path(world / "data", "train"))
    (tmp_path / "responses").mkdir()
    write_responses(tmp_path / "responses", [Response(e.id, e.answer, True, "", 0.1, 2, True) for e in rows])
    found = inputs(world, responses=tmp_path / "responses", model=base[0])
    message = r"all 100 training questions of 'math' correctly, but \d+\.\d% of 15 selection questions: it memorised"
    with pytest.raises(TrainingError, match=message):
        modifier.run(modifier.Config(domain="math"), found, tmp_path, context())


def test_draft_is_not_larger_than_its_base(world, base, tmp_path):
    found = inputs(world, responses=world / "responses", model=base[0])
    with pytest.raises(TrainingError, match=r"the draft has [\d,]+ weights, more than the base with"):
        draft.run(draft.Config(shape={"layers": 1}), found, tmp_path, context())
    partial = draft.Config(shape={"layers": 1}).shape  # the other sizes are those of a draft, not of a base
    assert partial == draft.Config().shape.model_copy(update={"layers": 1})


def test_draft_without_levels_learns_what_the_base_answers_correctly(world, base):
    tokenizer = HFTokenizer.load(base[0])
    rows = [example("1 plus 1", "2", difficulty=0), example("7 plus 7", "14", difficulty=0)]
    responses = {
        e.id: Response(e.id, e.answer, right, "", 0.5, 2, True) for e, right in zip(rows, (True, False), strict=True)
    }
    taught = draft.draft_rows(rows, responses, tokenizer, draft.Config())
    assert [row.easy for row in taught] == [True, False]
    assert [row.perplexity > 0 for row in taught] == [True, False]


def test_unknown_lora_target_is_refused_with_the_available_ones(base):
    with pytest.raises(TrainingError, match=r"'q_project' is not a layer of this model; did you mean 'q_proj'\?"):
        attach(load(base[0]), LoraShape(targets=("v_proj", "q_project")), 0)


@given(st.dictionaries(st.sampled_from(["math", "1", "math/1", "code"]), st.floats(0, 5)), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_weights_multiply_and_repeat(weights, seed):
    rows = [example(f"{i} plus 1", "1") for i in range(40)]
    expected = math.prod(weights.get(key, 1.0) for key in ("math", "1", "math/1"))
    seen = sft.weighted(rows, weights, seed)
    assert 40 * math.floor(expected) <= len(seen) <= 40 * math.ceil(expected)


def test_invalid_inputs_are_refused(world, tmp_path):
    tokenizer = HFTokenizer.load(world / "tokenizer")
    with pytest.raises(TrainingError, match="no examples to train on"):
        make_rows([], tokenizer, 64)
    long, short = example("word " * 50, "x"), example("1", "2")
    with pytest.raises(TrainingError, match="all 2 examples are longer than the model's context of 16 tokens"):
        make_rows([long, long], tokenizer, 16)
    assert [row.id for row in make_rows([long, short], tokenizer, 16)] == [short.id]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match="holds no model that can be loaded"):
        load(tmp_path / "empty")


def test_unknown_model_name_is_refused_without_network_access(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", None)  # a connection attempt would fail with another error
    with pytest.raises(ArtifactError, match=r"neither a folder under .* nor a model of the Hub"):
        locate("nobody/nothing", tmp_path)
