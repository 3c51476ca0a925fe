"""Stock llama.cpp loads and runs every kind of GGUF file we write: `Llama` in a process that does not import cogumi."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from cogumi.compress.gguf.export import export_adapter, export_model
from cogumi.compress.gguf.layout import Llama
from cogumi.core.files import sha256
from support.gguf import edit, edit_weights, some_ids
from support.pico import make_adapter, make_model
from support.real import llama3, qwen2

CHILD = """
import json, sys
import llama_cpp
import numpy as np
for job in json.load(sys.stdin):
    model = llama_cpp.Llama(job["path"], n_ctx=256, n_threads=1, logits_all=True, verbose=False, **job["options"])
    model.eval(job["ids"])
    best = np.array(model.scores[: len(job["ids"])]).argmax(1).tolist()
    model.reset()
    said = model.create_completion(job["ids"][:8], max_tokens=8, temperature=0)
    print(json.dumps({"best": best, "said": said["usage"]["completion_tokens"]}))
assert not any(name.split(".")[0] == "cogumi" for name in sys.modules)
"""


def importance_of(folder: Path, out: Path) -> Path:
    matrices = [t for t in Llama.load(folder).tensors() if len(t.shape) == 2]
    columns = {t.name: np.arange(1, t.shape[1] + 1, dtype=np.float32) for t in matrices}
    save_file(columns, out, {"base_sha256": sha256(folder / "model.safetensors")})
    return out


def trimmed(folder: Path) -> Path:
    """A model as stage `trim` writes it: an odd number of tokens, and unused rows after them."""
    make_model(folder, vocab=389)
    edit(folder / "config.json", vocab_size=397)
    more = torch.zeros(397 - 389, 64)
    edit_weights(folder, lambda w: w.update({n: torch.cat([v, more]) for n, v in w.items() if "embed_tokens" in n}))
    return folder


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Name of a file -> (most likely tokens by stock llama.cpp, the same by torch, tokens generated)."""
    root = tmp_path_factory.mktemp("stock")
    wide, plain = make_model(root / "wide", hidden=256), make_model(root / "plain", hidden=128)
    columns = importance_of(wide, root / "importance.safetensors")
    jobs: dict[str, tuple[Path, dict, Path]] = {}

    def add(name: str, folder: Path, type: str, options: dict | None = None, **settings) -> None:
        path = root / f"{name.replace(' ', '-')}.gguf"
        export_model(folder, path, type, **settings)
        jobs[name] = (path, options or {}, folder)

    for type in ("f16", "q8_0", "q6_k"):
        add(f"wide {type}", wide, type)
    add("q4_k_m importance", wide, "q4_k_m", importance=columns)
    add("q5_k_m types of its own", wide, "q5_k_m", types={"blk.0.*": "q8_0", "token_embd.weight": "bf16"})
    add("qwen2", qwen2(root / "qwen2"), "q8_0")
    add("stretched rotary frequencies", llama3(root / "llama3.1", tied=False), "q8_0")
    add("trimmed", trimmed(root / "trimmed"), "q8_0")
    export_adapter(make_adapter(root / "adapter", plain), plain, root / "adapter.gguf")
    add("an adapter", plain, "q8_0", {"lora_path": str(root / "adapter.gguf")})
    ids = some_ids(100, 380)
    tasks = [{"path": str(path), "options": options, "ids": ids} for path, options, _ in jobs.values()]
    done = subprocess.run([sys.executable, "-c", CHILD], input=json.dumps(tasks), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {}
    for (name, (_, _, folder)), line in zip(jobs.items(), done.stdout.splitlines(), strict=True):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if name == "an adapter":
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, root / "adapter")
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].argmax(1).numpy()
        found[name] = (np.array(json.loads(line)["best"]), expected, json.loads(line)["said"])
    return found


@pytest.mark.parametrize(
    ("name", "agreement"),
    [
        ("wide f16", 0.98),
        ("wide q8_0", 0.8),
        ("wide q6_k", 0.6),
        ("q5_k_m types of its own", 0.7),
        ("q4_k_m importance", 0.25),
        ("qwen2", 0.85),
        ("stretched rotary frequencies", 0.85),
        ("trimmed", 0.85),
        ("an adapter", 0.85),
    ],
)
def test_stock_llama_cpp_agrees_with_torch(answers, name, agreement):
    """Detect broken files. Rounding flips near-ties of random weights, and chance agreement is 1 in 400; the suite
    `compression` measures the loss of each type on a trained model.
    """
    got, expected, said = answers[name]
    assert said >= 1
    assert (got == expected).mean() >= agreement
