"""The benchmark: its synthetic models have the stated properties, and its document contains every row."""

import json
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import psutil
import pytest
from gguf import GGUFReader

from cogumi.core.errors import RequestError
from cogumi.core.types import Request
from cogumi.engine.llama.binding.model import Model
from cogumi.engine.llama.engine import LlamaEngine
from cogumi.engine.protocol import final_reply
from cogumi.evaluate.bench import memory_use, speed
from cogumi.evaluate.bench.adapter_training import adapter_training
from cogumi.evaluate.bench.busy_machine import busy, busy_loops
from cogumi.evaluate.bench.paired import Setup, alternate
from cogumi.evaluate.bench.roofline import Memory, weight_bytes
from cogumi.evaluate.bench.run import NAMED_ONLY, chosen, measures, run
from cogumi.evaluate.bench.soak import soak
from cogumi.evaluate.bench.synthetic_models import SHAPES, chain, make_adapter, make_draft, make_model
from support.gguf import stock_quantize
from support.waiting import until

ORDER = chain(SHAPES["pico"].vocabulary).tolist()
PROMISED = {
    *("single_stream", "roofline", "concurrency_8", "busy", "ngram", "kv_q4_0", "adapter_warm", "adapter_cold"),
    *("speculation_0.3", "speculation_0.6", "speculation_0.75", "speculation_0.9", "prefill_ahead"),
}


class RecordedProgress:
    """Progress that records its calls."""

    def __init__(self):
        self.names, self.shares = [], []

    def started(self, name, number, of):
        self.names.append(name)

    def advanced(self, share):
        self.shares.append(share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bench")


@pytest.fixture
def cache(folder, monkeypatch):
    monkeypatch.setenv("COGUMI_CACHE", str(folder))
    return folder


@pytest.fixture
def setup(cache):
    model = make_model(cache / "shapes", "pico")
    return Setup(model, "pico", cache / "shapes", threads=1, words=np.array(ORDER), minutes=0)


def walk(engine, start, n, **how):
    request = Request(prompt=tuple(ORDER[start : start + 4]), max_tokens=n, **how)
    return final_reply(engine.generate(request))


def test_synthetic_model_follows_its_token_chain(folder):
    with closing(LlamaEngine(make_model(folder, "pico"), threads=1)) as engine:
        reply = walk(engine, 10, 100)
        assert [token.id for token in reply.tokens] == ORDER[14:114]
        assert min(token.margin for token in reply.tokens) > 10
        assert engine.tokenizer.decode(engine.tokenizer.encode("Any text, ä €!")) == "Any text, ä €!"
        assert engine.tokenizer.eos not in ORDER


@pytest.mark.parametrize("accept", [0.0, 0.3, 0.75, 1.0])
def test_synthetic_draft_has_the_configured_acceptance(folder, accept):
    draft = make_draft(folder, "pico", accept)
    assert Model(draft).tokenizer.same_vocabulary(Model(make_model(folder, "pico")).tokenizer)
    with closing(LlamaEngine(draft, threads=1)) as engine:
        running = [engine.generate(Request(prompt=(token,), max_tokens=1)) for token in ORDER]
        message = [final_reply(events).tokens[0].id for events in running]
    right = np.mean(np.array(message) == np.roll(ORDER, -1))
    assert right == pytest.approx(accept, abs=0.001)


def test_tensor_types_equal_llama_cpps_choice(folder, monkeypatch):
    monkeypatch.setitem(SHAPES, "tall", replace(SHAPES["pico"], layers=16, vocabulary=512))
    mixed = folder / "mixed.gguf"
    stock_quantize(make_model(folder, "tall", "f16"), mixed, "q4_k_m")
    made, chosen_there = (
        {tensor.name: tensor.tensor_type for tensor in GGUFReader(path).tensors}
        for path in (make_model(folder, "tall"), mixed)
    )
    assert made == chosen_there


def test_weights_read_per_token_exclude_the_embedding(folder):
    path = make_model(folder, "pico")
    tensors = {tensor.name: int(tensor.n_bytes) for tensor in GGUFReader(path).tensors}
    embedding = tensors.pop("token_embd.weight")
    assert weight_bytes(path) == sum(tensors.values()) + embedding // SHAPES["pico"].vocabulary


def test_synthetic_adapter_fits_the_shape_and_changes_the_logits(folder):
    path = make_adapter(folder, "pico", 100_000)
    assert 60_000 < path.stat().st_size < 140_000
    with closing(LlamaEngine(make_model(folder, "pico"), threads=1, adapters={"a": path})) as engine:
        plain, adapted = walk(engine, 0, 20), walk(engine, 0, 20, adapter="a")
    assert [t.id for t in adapted.tokens] == [t.id for t in plain.tokens]
    assert [t.margin for t in adapted.tokens] != [t.margin for t in plain.tokens]


def test_model_files_are_created_once_and_atomically(folder):
    path = make_model(folder, "pico")
    before = path.stat().st_mtime_ns
    assert make_model(folder, "pico").stat().st_mtime_ns == before
    assert not list(folder.glob("*.part"))


def test_alternating_measurement_cancels_drift():
    """With a clock that slows steadily, equal workloads stay nearly equal and a real ratio is measured."""
    speeds = iter(100 * 0.9**i for i in range(40))
    pairs = alternate(lambda: 2 * next(speeds), lambda: next(speeds), lambda share: None, 10)
    assert pairs.ratio == pytest.approx(2, rel=0.02)
    row = pairs.row("x", "unit", least=1.9)
    assert row.conditions["met"]
    assert row.conditions["spread"][0] < 2 < row.conditions["spread"][1]


def test_measured_bandwidth_is_plausible_for_memory():
    with closing(Memory(1)) as arrays:
        assert 1e8 < arrays.bandwidth() < 1e13


def test_all_rows_exist_and_long_ones_run_only_when_named():
    assert set(measures()) >= PROMISED
    assert set(chosen((), (0.3, 0.6, 0.75, 0.9))) == set(measures()) - set(NAMED_ONLY)
    assert list(chosen(["soak", "ngram"], (0.5,))) == ["ngram", "soak"]
    assert list(chosen(["speculation_0.5"], (0.5,))) == ["speculation_0.5"]


def test_unknown_row_is_refused_with_the_nearest_name():
    with pytest.raises(RequestError, match="did you mean 'single_stream'"):
        chosen(["single_steam"], (0.5,))


def test_drafts_are_accepted_at_the_simulated_rate(setup):
    row = speed.speculation(setup, 0.9)
    assert row.conditions["kept_of_drafted"] == pytest.approx(sum(0.9**i for i in range(1, 6)) / 5, abs=0.2)
    assert row.ratio > 0


def test_lookup_finds_the_copied_passage(setup):
    row = speed.ngram(setup)
    assert row.conditions["kept_of_drafted"] > 0.5


def test_quantized_cache_is_smaller(setup):
    row = memory_use.kv_cache(setup, "q4_0", 0.29)
    assert row.ratio == pytest.approx(18 / 64, abs=0.1)  # a block of 32 values has 18 bytes in q4_0 and 64 in f16
    assert row.conditions["computed_bytes_per_token"] == [288, 1024]


def test_speed_of_training_over_cached_states_is_compared_with_all_layers(setup):
    """No speed is asserted: a busy machine can make any of these ratios smaller than it is."""
    row = adapter_training(setup)
    low, high = row.conditions["spread"]
    assert 0 < low <= row.ratio <= high
    assert row.conditions["without_cache"] > 0
    assert row.conditions["caching_tokens_s"] > 0
    assert row.conditions["met"] is (row.ratio >= 3)


def test_speed_beside_busy_loops_is_compared_with_the_quiet_machine(setup):
    before = set(psutil.Process().children())
    row = busy(setup)
    found = row.conditions
    assert (row.name, row.unit, found["loops"], found["goal"], found["rounds"]) == ("busy", "tokens/s", 2, ">= 0.4", 5)
    assert 0 < found["spread"][0] <= row.ratio <= found["spread"][1]
    assert 0 < found["prompt_spread"][0] <= found["prompt_ratio"] + 0.001 <= found["prompt_spread"][1] + 0.002
    assert found["met"] is (min(row.ratio, found["prompt_ratio"]) >= 0.4)
    assert set(psutil.Process().children()) == before


def test_busy_loops_compute_until_their_block_ends_even_by_ctrl_c():
    loops = []

    def interrupted():
        with busy_loops(2) as running:
            loops.extend(running)
            until(lambda: all(psutil.Process(loop.pid).cpu_times().user > 0.1 for loop in loops))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [loop.poll() for loop in loops] == [-9, -9]


def test_busy_loops_end_with_a_parent_that_is_killed():
    code = """
from cogumi.evaluate.bench.busy_machine import busy_loops
with busy_loops(1) as loops:
    print(loops[0].pid, flush=True)
    input()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as parent:
        loop = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    until(lambda: not loop.is_running() or loop.status() == psutil.STATUS_ZOMBIE)


def test_concurrent_stress_does_not_change_answers(setup):
    """200 requests per round from 16 clients, with cancellations, adapters, drafts, several lengths and sampling."""
    row = soak(replace(setup, minutes=1))
    assert row.ratio == 1
    assert row.baseline > 100
    assert row.conditions["slots_free"] == "8 of 8"


def test_model_of_a_user_has_no_synthetic_draft(cache):
    progress = RecordedProgress()
    model = make_model(cache / "shapes", "pico")
    found = run(progress, only=["speculation_0.3", "prefill_ahead"], model=model, threads=1)
    failed, measured = found["rows"]
    assert failed["ratio"] is None
    assert "without --model" in failed["conditions"]["error"]
    assert measured["ratio"] < 0.5
    assert progress.names == ["speculation_0.3", "prefill_ahead"]
    assert progress.shares[-1] == 1


def test_command_writes_a_document_and_a_plot(cache, tmp_path):
    words = ["--shape", "pico", "--only", "single_stream", "--only", "adapter_warm", "--only", "adapter_cold"]
    files = ["--json", tmp_path / "out.json", "--picture", tmp_path / "out.png"]
    command = [sys.executable, "-m", "cogumi", "bench", *words, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "single_stream" in done.stdout
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found) >= {"machine", "bandwidth_gb_s", "rows"}
    assert [row["name"] for row in found["rows"]] == ["single_stream", "adapter_warm", "adapter_cold"]
    for row in found["rows"]:
        assert set(row) == {"name", "ratio", "value", "baseline", "unit", "conditions"}
        assert row["ratio"] > 0
        assert row["conditions"]["spread"][0] <= row["ratio"] <= row["conditions"]["spread"][1]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "roofine"], "did you mean 'roofline'?"),
        (["--shape", "pica"], "did you mean 'pico'?"),
        (["--picture", "x.doc"], ".png"),
        (["--model", "missing.gguf"], "does not exist"),
        (["--text", "x.txt"], "--model"),
    ],
)
def test_unusable_arguments_are_refused_in_one_line(cache, words, message):
    done = subprocess.run([sys.executable, "-m", "cogumi", "bench", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_llama_cpp_server_gives_the_same_answer(setup):
    pytest.importorskip("xllamacpp")
    from cogumi.evaluate.bench.llama_server import LlamaServer

    with closing(LlamaServer(setup.model, slots=2, context=64, threads=1)) as server:
        assert server.complete([ORDER[:4], ORDER[50:60]], [8, 8]) == [ORDER[4:12], ORDER[60:68]]
        assert server.processor_seconds() > 0
    with pytest.raises(RequestError, match="cannot open"):
        LlamaServer(setup.folder / "missing.gguf", slots=1, context=64, threads=1)
