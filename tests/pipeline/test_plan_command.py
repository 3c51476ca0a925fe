"""`cogumi plan`: its output, and its one-line errors."""

import json
import re

import pytest
import yaml
from typer.testing import CliRunner

from cogumi.bundle.format import BASE, DRAFT
from cogumi.cli.main import app
from cogumi.compress.gguf.export import export_model
from cogumi.core.errors import CogumiError
from support.pico import make_model
from support.real import qwen2

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def cogumi(*words):
    return CliRunner().invoke(app, ["plan", *words], env={"COLUMNS": "200"})


def test_planned_context_is_limited_to_that_of_the_base(tmp_path):
    folder = make_model(tmp_path / "mine")
    most = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    for asked_for, planned in ((most - 1, most - 1), (most, most), (10 * most, most)):
        words = (str(folder), "--context", str(asked_for))
        assert json.loads(cogumi(*words, "--json").stdout)["sizes"]["serving"]["context"] == planned
        assert ("the maximum of the base" in cogumi(*words).stdout) is (planned == most)


def test_requested_speed_is_compared_with_the_expected_one():
    speed = ("Llama-3.2-1B", "--bandwidth", "100GB/s", "--tokens-per-second")
    fits, misses = cogumi(*speed, "1").stdout, cogumi(*speed, "80").stdout
    assert "it fits as it is\n" in fits
    most = float(re.search(r"\(memory allows ([\d.]+)\)", misses)[1])
    assert most > 80  # the bandwidth would allow it, but the runtime reaches half of that
    assert f"it does not fit: about {most / 2:.1f} tokens/s of 80" in misses
    for shown in (fits, misses):
        assert "tokens/s: 50% (usual: 40% to 65%, measure it: cogumi bench) of what memory of 100.0 GB/s" in shown
        assert "with expected tokens/s, + where it fits" in " ".join(shown.split())
    assert "it fits as it is\n" in cogumi("Llama-3.2-1B", "--disk", "9GB", "--bandwidth", "9GB/s").stdout
    tight = cogumi("Llama-3.2-1B", "--ram", "1.2GB", "--bandwidth", "9GB/s").stdout
    assert "in memory without repacking (open with --no-repack)" in tight


def test_models_beside_the_bundle_are_listed(tmp_path):
    sizes = json.loads(cogumi("compression", "--json").stdout)["files_beside"]
    assert {"small", "plain", "base_f32", "pruned_f32"} < set(sizes)
    assert sizes["small"] < sizes["base_f32"] / 4
    assert not {"base_gguf", "draft_gguf"} & set(sizes)
    assert "files beside the bundle" in cogumi("compression").stdout
    assert json.loads(cogumi("Llama-3.2-1B", "--json").stdout)["files_beside"] == {}


def test_types_that_a_step_will_determine_are_reported_as_unknown(tmp_path):
    qwen2(tmp_path / "mine")
    base = {"name": "base", "stage": "sft", "inputs": {"examples": "data"}, "config": {"init": "mine"}}
    scaled = {"name": "scaled", "stage": "awq", "inputs": {"examples": "data", "model": "base"}}
    export = {"name": "small", "stage": "gguf", "inputs": {"model": "scaled", "types": "scaled"}}
    steps = [{"name": "data", "stage": "world"}, base, scaled, export]
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "steps": steps}))
    shown = cogumi(str(path)).stdout
    assert "small: the types of step 'scaled' are known once it ran; planned as if none were given" in shown
    assert "files beside the bundle" in shown


def test_command_prints_figures():
    """Compared with the files of a finished tiny build."""
    done = cogumi("tiny", "--disk", "890MB", "--ram", "1.5GB", "--tokens-per-second", "30", "--json")
    assert done.exit_code == 0
    sizes = json.loads(done.stdout)["sizes"]
    assert sizes["asked"]["fits"]
    assert sizes["files"][BASE] == pytest.approx(1_079_232, rel=0.003)
    assert sizes["files"][DRAFT] == pytest.approx(370_432, rel=0.01)
    assert sizes["files"]["modifiers/code.gguf"] == 1_232_800
    assert sum(sizes["files"].values()) == pytest.approx(32_443_890, rel=0.001)
    assert sizes["bandwidth_bytes_per_second"] > 1e8
    assert sizes["refusal"] is None
    types = [route["type"] for route in sizes["routes"]][:7]
    assert types.index("q8_0") < types.index("q6_k")  # as large here: rows of 128 fill no K block
    assert {"bits_per_weight", "ram_bytes", "repack", "tokens_per_second_at_most"} <= set(sizes["routes"][0])
    memory = sizes["memory"]
    assert sum(memory.values()) == sizes["asked"]["ram_bytes"]


def test_plan_of_a_single_model_by_name_config_or_file(tmp_path):
    shown = cogumi("Llama-3.2-1B", "--disk", "700MB", "--bandwidth", "18GB/s")
    assert shown.exit_code == 0
    assert "smallest change that fits: vocabulary of 65,536 instead of 128,256 ids: 698.5 MB on disk" in shown.stdout
    check = cogumi("Llama-3.2-1B", "--disk", "700MB", "--check")
    assert check.exit_code == 1
    assert check.stderr == "Llama-3.2-1B does not fit: 807.7 MB on disk of 700.0 MB\n"
    folder = make_model(tmp_path / "mine")
    file = tmp_path / "mine.gguf"
    export_model(folder, file, "q4_k_m")
    for name in (folder, folder / "config.json"):
        found = json.loads(cogumi(str(name), "--json").stdout)["sizes"]
        assert found["files"] == {BASE: file.stat().st_size}


def test_types_file_beside_a_model_is_used(tmp_path):
    folder, types = make_model(tmp_path / "mine"), {"blk.0.*": "q8_0", "token_embd.weight": "f16"}
    (folder / "types.json").write_text(json.dumps(types))
    file = tmp_path / "mine.gguf"
    export_model(folder, file, "q4_k_m", types)
    found = json.loads(cogumi(str(folder), "--json").stdout)["sizes"]
    assert found["files"] == {BASE: file.stat().st_size}
    (folder / "types.json").write_text('{"blk.7.*": "q8_0"}')
    assert "types: 'blk.7.*' matches no matrix" in str(cogumi(str(folder)).exception)


def test_existing_file_is_measured_beside_its_plan(tmp_path):
    file = tmp_path / "mine.gguf"
    export_model(make_model(tmp_path / "mine"), file, "q8_0")
    measured = json.loads(cogumi(str(file), "--json").stdout)["measured"]
    assert measured["bytes"] == measured["planned_bytes"] == file.stat().st_size
    assert 0 < measured["tokens_per_second"] < 1.5 * measured["tokens_per_second_at_most"]


def test_impossible_budget_gives_one_line_and_exit_code_1():
    done = cogumi("Llama-3.1-8B", "--disk", "540MB", "--check")
    assert done.exit_code == 1
    assert not done.stdout
    (line,) = done.stderr.splitlines()
    assert "0.54 bits each" in line
    result = cogumi("Llama-3.1-8B", "--disk", "540MB", "--json")
    assert result.exit_code == 1
    assert "0.54 bits each" in json.loads(result.stdout)["sizes"]["refusal"]


def test_unplannable_input_is_refused_in_one_line(tmp_path):
    def refused(*words):
        error = cogumi(*words).exception
        assert isinstance(error, CogumiError), error
        assert "\n" not in str(error)
        return str(error)

    assert "write it like 80GB" in refused("tiny", "--disk", "lots")
    assert "less than one byte" in refused("tiny", "--ram", "0GB")
    assert "is not a valid speed" in refused("tiny", "--tokens-per-second", "-3")
    assert "write it like 50GB/s" in refused("tiny", "--bandwidth", "fast")
    assert "did you mean 'Llama-3.2-1B'" in refused("Llama-3.2-1X")
    assert "did you mean 'laptop-890mb'" in refused("laptop-890")
    steps = [{"name": "data", "stage": "world"}]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"name": "mine", "steps": steps}))
    assert "makes no bundle" in refused(str(tmp_path / "mine.yaml"), "--disk", "1GB")
    good = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 300,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
    }
    config = tmp_path / "config.json"
    damaged = {
        "supported: LlamaForCausalLM, Qwen2ForCausalLM": good | {"architectures": ["MambaForCausalLM"]},
        "lacks 'hidden_size'": {"architectures": ["LlamaForCausalLM"]},
        "layers is 0, not 1 to 1000": good | {"num_hidden_layers": 0},
        "layers is 1000000000, not": good | {"num_hidden_layers": 10**9},
        "vocabulary is -5, not": good | {"vocab_size": -5},
        "not numbers above 0": good | {"num_attention_heads": 0},
        "feed_forward is 'wide', not": good | {"intermediate_size": "wide"},
        "heads cannot share 4": good | {"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8},
        "rope_scaling is 'x', not an object": good | {"rope_scaling": "x"},
        "rope_parameters is [1], not an object": good | {"rope_parameters": [1]},
        "a rope or norm value is not a number": good | {"rms_norm_eps": "small"},
        "is not a number; copy": good | {"rope_scaling": LLAMA3 | {"factor": None}},
        "is a 5; supported": good | {"architectures": 3, "model_type": 5},
        "hidden_act is 'gelu'": good | {"hidden_act": "gelu"},
    }
    for message, document in damaged.items():
        config.write_text(json.dumps(document))
        assert message in refused(str(config)), message
    config.write_text("{")
    assert "cannot be read" in refused(str(tmp_path))
    config.write_text(json.dumps(good))
    assert cogumi(str(tmp_path)).exit_code == 0
    (tmp_path / "some.gguf").write_bytes(b"GGUF")
    assert "not a complete GGUF model" in refused(str(tmp_path / "some.gguf"))
    assert refused(str(tmp_path / "nosuch.gguf")).startswith("there is no file")
    assert "'lots' is not an amount of bytes" in refused("tiny", "--disk", "lots")
