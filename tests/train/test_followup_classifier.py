"""The classifier of dissatisfied follow-ups: its training dialogues, stage, inference without torch, and suite."""

import re
import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cogumi.cascade.dissatisfaction import FILE, MARKS, UNKNOWN, Escalation, describe, encode, last_turn, numbered
from cogumi.core.errors import BundleError, CogumiError, DataError, RecipeError
from cogumi.core.files import sha256
from cogumi.core.stage import Context
from cogumi.core.types import Message
from cogumi.data.followups.dialogues import TOPICS, draw, templates
from cogumi.evaluate.suite import Task
from cogumi.evaluate.suites import escalation, rated_dialogues
from cogumi.evaluate.suites.rated_dialogues import halves, read_rated
from cogumi.models.followup_lstm import FollowUpNet, export, pad
from cogumi.train import followup_classifier as stage
from cogumi.train.fit_followup_net import best_threshold
from support.public_data import public_data

SETS = ("train", "selection", "heldout")
PICO = {"model": "pico", "teacher_rows": 32, "soft_rows": 32, "rows": 2000, "width": 16, "hidden": 16, "judged": 100}


def context(root, seed=0):
    return Context(seed, 1, root, lambda done, total, figures: None)


def talk(*texts):
    return [Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with a pico encoder whose vocabulary covers the dialogues, and `bundle` with the output of the stage."""
    root = tmp_path_factory.mktemp("escalation")
    texts = [m.content.lower() for d in draw("train", 600, 1, registers=False) for m in d.messages]
    found = sorted({word for text in texts for word in re.findall(r"[a-z]+|[^\w\s]", text)} | set("abcdefghij0"))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *found]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(tokenizer_object=raw).save_pretrained(root / "pico")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=256, **shape)).save_pretrained(root / "pico")
    (root / "bundle").mkdir()
    metrics = stage.run(stage.Config(**PICO), {}, root / "bundle", context(root))
    (root / "metrics.txt").write_text(repr(metrics))
    return root


@pytest.fixture(scope="module")
def net(root):
    return Escalation(root / "bundle" / FILE)


def test_sets_share_no_topic_and_no_template():
    lines = {n: {x for bad in (0, 1) for found in templates(n, bool(bad)).values() for x in found} for n in SETS}
    for one, two in (("train", "selection"), ("train", "heldout"), ("selection", "heldout")):
        assert all(re.fullmatch(r"<\w+>", line) for line in lines[one] & lines[two])
        assert not {t.subject for t in TOPICS[one]} & {t.subject for t in TOPICS[two]}
        asked = ({q for t in TOPICS[n] for q in t.questions} for n in (one, two))
        assert not set.intersection(*asked)


@pytest.mark.parametrize("name", SETS)
def test_dialogues_are_pairs_that_differ_only_in_the_follow_up(name):
    dialogues = draw(name, 400, 3)
    assert dialogues == draw(name, 400, 3) != draw(name, 400, 4)
    for contented, dissatisfied in zip(dialogues[::2], dialogues[1::2], strict=True):
        assert (contented.dissatisfied, dissatisfied.dissatisfied) == (False, True)
        assert contented.messages[:2] == dissatisfied.messages[:2]
    assert not [d for d in dialogues for m in d.messages if set(m.content) & set("{}<|") or "$name" in m.content]


def test_held_out_follow_ups_do_not_occur_in_training():
    trained, held_out = (
        {
            re.sub(r"[\s.,:;!?'()-]", "", d.messages[-1].content.lower())
            for d in draw(name, rows, 0, registers=False)
            if d.template != "<error>"  # a pasted message is the same in all dialogues
        }
        for name, rows in (("train", 8000), ("heldout", 1500))
    )
    both = trained & held_out
    assert not both


@given(st.lists(st.text(max_size=80), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None)
def test_any_turn_is_encoded_with_the_follow_up_first(turn):
    words = numbered(["a", "b", "the", "no"])
    ids, marks = encode(tuple(turn), words)
    assert len(ids) == len(marks) >= 1
    assert set(ids.tolist()) <= {UNKNOWN, *words.values()}
    who = (marks - 1) // 4
    assert who[0] == 2
    assert (np.diff(who) <= 0).all()
    assert marks.max() < MARKS


def test_marks_show_words_of_earlier_messages():
    words = numbered(["how", "old", "is", "she", "ten"])
    ids, marks = encode(("How old is she", "ten", "HOW old, ten"), words)
    assert ids.tolist() == [2, 3, UNKNOWN, 6, 6, 2, 3, 4, 5]
    assert (marks - 1).tolist() == [8 + 1, 8 + 1, 8, 8 + 2, 4 + 2, 2, 2, 0, 0]


def test_emoji_are_encoded_by_name():
    words = numbered(["thumbs", "down", "sign"])
    assert encode(("", "", "👎"), words)[0].tolist() == [2, 3, 4]


@given(
    st.lists(st.sampled_from(["no", "that", "is", "wrong", "thanks", "what", "Paris", "?", "xyzzy", "12"]), max_size=40)
)
@settings(max_examples=30, deadline=None)
def test_inference_from_the_file_equals_torch(tmp_path_factory, follow_up):
    torch.manual_seed(1)
    words = ["no", "that", "is", "wrong", "thanks", "what", "paris", "?", "0"]
    net = FollowUpNet(
        torch.randint(-127, 127, (len(words) + 2, 6), dtype=torch.int8), torch.rand(6) / 50, MARKS, 5, 0.1
    )
    torch.nn.init.normal_(net.wide.weight)
    path = tmp_path_factory.mktemp("net") / FILE
    export(net, path, describe(words, 0.5, 0.5))
    messages = talk("what is Paris", "that is Paris 12", " ".join(["no", *follow_up]))
    row = encode(last_turn(messages), numbered(words))
    # so that the other row is padded
    longer = (np.tile(row[0], 2)[: len(row[0]) + 3], np.tile(row[1], 2)[: len(row[1]) + 3])
    with torch.no_grad():
        expected = torch.sigmoid(net.eval()(*pad([row, longer]))[0]).item()
    assert Escalation(path).dissatisfied(messages) == pytest.approx(expected, abs=1e-6)


def test_stage_learns_and_is_reproducible(root, tmp_path):
    metrics = stage.run(stage.Config(**PICO), {}, tmp_path, context(root))
    assert sha256(tmp_path / FILE) == sha256(root / "bundle" / FILE)
    assert metrics["accuracy"]["selection"] > 0.65  # chance level is 0.5
    assert metrics["bytes"] == (tmp_path / FILE).stat().st_size
    assert metrics["epochs"] == {"teacher": 3, "student": 3}
    assert set(metrics["teacher_accuracy"]) == {"selection", "heldout"}
    other = tmp_path / "other"
    other.mkdir()
    stage.run(stage.Config(**{**PICO, "rows": 64}), {}, other, context(root, seed=1))
    assert sha256(other / FILE) != sha256(tmp_path / FILE)


def test_complaints_are_distinguished_from_thanks(net):
    before = ("What is the capital of Norway?", "The capital of Norway is Lima.")
    for bad, good in (
        ("No, that is wrong.", "Thank you, that is great."),
        ("You did not answer my question!", "Can you explain that?"),
        ("this is useless", "perfect, thanks"),
    ):
        assert net.dissatisfied(talk(*before, bad)) > net.dissatisfied(talk(*before, good))


@pytest.mark.parametrize(
    "messages",
    [
        [],
        talk("no, that is wrong"),
        talk("a", "b"),
        talk("a", "b", ""),
        talk("a", "b", " \n\t"),
        [Message("system", "x"), Message("user", "no, wrong")],
        [Message("assistant", "x"), Message("user", "a"), Message("user", "wrong")],
    ],
)
def test_dialogue_without_an_answer_is_not_dissatisfied(net, messages):
    assert net.dissatisfied(messages) == 0.0


@pytest.mark.parametrize(
    "text", ["no " * 33_334, "\x00\x01\x1b[31m", "\u0301", "\ud800", "中文不对", "𝔫𝔬", "x" * 100_000, "👎" * 50_000]
)
def test_any_text_gets_a_probability(net, text):
    for messages in (talk(text, text, text), talk("", "", text), [Message("system", text), *talk("a", text, "no")]):
        assert 0.0 <= net.dissatisfied(messages) <= 1.0


@given(st.text(max_size=200))
@settings(max_examples=50, deadline=None)
def test_system_message_and_earlier_turns_do_not_matter(net, text):
    turn = talk("How old is she?", "Ten.", text)
    assert net.dissatisfied([Message("system", "wrong!"), *talk("no", "useless"), *turn]) == net.dissatisfied(turn)


def test_classifier_is_thread_safe(net):
    turns = [d.messages for d in draw("heldout", 40, 0)]
    expected, found = [net.dissatisfied(t) for t in turns], {}

    def work(k):
        found[k] = [net.dissatisfied(t) for t in turns]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[k] == expected for k in range(4))


def test_invalid_classifier_files_are_refused(root, tmp_path):
    import onnx

    path = tmp_path / FILE
    with pytest.raises(BundleError, match=r"escalation\.onnx"):
        Escalation(path)
    path.write_bytes(b"not a model")
    with pytest.raises(BundleError, match="build the bundle again"):
        Escalation(path)
    whole = (root / "bundle" / FILE).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BundleError, match="build the bundle again"):
        Escalation(path)
    for change in ({"format": "cogumi-escalation-0"}, {"format": ""}, {"threshold": "high"}, {"words": None}):
        model = onnx.load_from_string(whole)
        metadata = {p.key: p.value for p in model.metadata_props} | change
        del model.metadata_props[:]
        onnx.helper.set_model_props(model, {k: v for k, v in metadata.items() if v is not None})
        path.write_bytes(model.SerializeToString())
        with pytest.raises(BundleError, match="build the bundle again"):
            Escalation(path)


def test_unsuitable_encoder_is_refused(root):
    class Other(torch.nn.Module):
        pass

    with pytest.raises(RecipeError, match="BERT-like"):
        stage.Teacher(type("E", (), {"model": Other()})(), None, 1)


RATED = """USER\tI need a train.\tINFORM\t3,3,3
SYSTEM\tSorry, there is none.\tOFFER\t
USER\tAre you sure?\tREQUEST\t2,2,3
SYSTEM\tYes.\t\t
USER\tNo rating here\tREQUEST\t
USER\tOVERALL\t\t2,2,3

not a line of this format
USER\tHello\tINFORM\t3,x
NOBODY\tHello\tINFORM\t3
USER\tHello\tINFORM\t9
SYSTEM\tHi.
USER\tThank you.\tTHANK\t5,4,4\tbecause
"""


def test_rated_dialogues_are_read_and_invalid_lines_counted(tmp_path):
    file = tmp_path / "a.txt"
    file.write_bytes(RATED.replace("\n", "\r\n").encode())
    rated = read_rated(file)
    assert [(t.messages[-1].content, t.ratings, t.dissatisfied, t.dialogue) for t in rated.turns] == [
        ("Are you sure?", (2, 2, 3), True, 0),
        ("Thank you.", (5, 4, 4), False, 1),
    ]
    assert rated.turns[0].messages[:2] == (
        Message("user", "I need a train."),
        Message("assistant", "Sorry, there is none."),
    )
    assert (rated.dialogues, rated.malformed, rated.left_out) == (2, 4, 2)
    shutil.copy(file, tmp_path / "b.txt")
    assert len(read_rated(tmp_path).turns) == 4
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no rated turn"):
        read_rated(tmp_path / "empty.txt")
    with pytest.raises(DataError, match="cannot read"):
        read_rated(tmp_path / "none.txt")


def test_no_dialogue_is_in_both_splits(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join([RATED.split("\n\n")[0]] * 20))
    rated = read_rated(file)
    one, two = halves(rated, 0.5, 0)
    assert len(one) == len(two) == 10
    assert not {t.dialogue for t in one} & {t.dialogue for t in two}
    assert halves(rated, 0.5, 0) == (one, two) != halves(rated, 0.5, 1)


def test_metrics_on_known_scores():
    truth = np.array([True, True, False, False])
    assert escalation.f1(truth, np.array([True, False, True, False])) == 0.5
    assert escalation.f1(truth, np.zeros(4, dtype=bool)) == 0.0
    assert best_threshold(np.array([0.9, 0.6, 0.5, 0.1]), truth, escalation.f1) == pytest.approx(0.6, abs=0.1)
    low, high = escalation.bounds(np.repeat(np.arange(50), 4), lambda rows: float(np.mean(rows % 2)), 0)
    assert low == high == 0.5  # every group has equally many of each
    low, high = escalation.bounds(np.arange(200), lambda rows: float(np.mean(rows % 2)), 0)
    assert 0.4 < low < 0.5 < high < 0.6


def test_suite_evaluates_bundle_and_rated_dialogues(root, tmp_path, monkeypatch):
    monkeypatch.setattr(escalation, "ROWS", 200)
    monkeypatch.setattr(escalation, "RESAMPLES", 50)
    monkeypatch.setattr(escalation, "EPOCHS", 20)
    monkeypatch.setattr(escalation, "DEFAULT", "pico")
    monkeypatch.chdir(root)
    good = "USER\tHello\t\t3,3\nSYSTEM\tHi.\t\t\nUSER\tThank you, perfect.\t\t4,4"
    bad = "USER\tHello\t\t3,3\nSYSTEM\tHi.\t\t\nUSER\tNo, that is wrong.\t\t1,2"
    (tmp_path / "rated.txt").write_text("\n\n".join([good, bad, good] * 40))
    findings = escalation.run(Task(root / "bundle", tmp_path / "rated.txt", tmp_path))
    values = {figure.name: figure.value for figure in findings.figures}
    assert values["AUROC, net that learned from rated dialogues"] > 0.95
    assert values["F1, net that learned from rated dialogues"] > 0.95
    assert values["AUROC, keywords"] == 1.0
    assert values["AUROC, majority"] == 0.5
    assert values["F1, majority"] == 0.0
    assert values["size, MB"] < 3
    assert findings.facts["turns judged"] == 60
    assert [path.stat().st_size > 10_000 for path in findings.pictures] == [True]
    for figure in findings.figures:
        if figure.low is not None:
            assert figure.low <= figure.value <= figure.high
    with pytest.raises(CogumiError, match="escalation"):
        escalation.run(Task(tmp_path))


def test_public_ratings_are_read_completely():
    rated = read_rated(public_data("uss_satisfaction"))
    assert rated.malformed == 0
    assert rated.dialogues == 2000
    assert 0.1 < np.mean([turn.dissatisfied for turn in rated.turns]) < 0.2
    assert rated_dialogues.DISSATISFIED == 2.75
