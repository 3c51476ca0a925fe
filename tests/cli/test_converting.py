"""`cogumi convert` as a real process."""

import json

from cogumi.compress.gguf.export import export_model
from support.bare_bytes import without_bytes
from support.cli import cogumi, one_line
from support.pico import make_model


def test_a_file_becomes_a_folder_and_a_folder_a_file(tmp_path):
    export_model(without_bytes(make_model(tmp_path / "model")), tmp_path / "some.gguf", "q4_1")
    done = cogumi("convert", "some.gguf", "folder", "--json", cwd=tmp_path)
    figures = json.loads(done.stdout)
    assert (figures["out"], figures["type"]) == ("folder", "f32")
    assert figures["missing_bytes"] == [0x04, 0x13, 0xC0, 0xF1, 0xFF]
    assert done.stderr.count("has no token for 5 of the 256 bytes (04 13 C0 F1 FF)") == 1
    assert {path.name for path in (tmp_path / "folder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    back = cogumi("convert", "folder", "back.gguf", "--type", "q4_1", cwd=tmp_path)
    assert back.stdout.startswith(f"back.gguf: {figures['parameters']:,} weights as q4_1, ")
    assert "exists; choose another path" in one_line(cogumi("convert", "folder", "back.gguf", cwd=tmp_path, ok=1))
    assert "there is no model 'nothing'" in one_line(cogumi("convert", "nothing", "x", cwd=tmp_path, ok=1))
