"""Bundles of synthetic bytes, and their packed form, for the tests of archives."""

import random

from cogumi.bundle.format import write_bundle
from cogumi.bundle.packed import FRAME, staged
from cogumi.compress.pack.archive import Config, pack_folder

BIG = FRAME + 5
PARTS = {
    name: {"base_fingerprint": "b", "tokenizer_sha256": "t"} for name in ("base.gguf", "draft.gguf", "modifiers/m.gguf")
}
CONTENT = {
    "base.gguf": random.Random(0).randbytes(BIG // 2) + bytes(BIG - BIG // 2),
    "draft.gguf": b"",
    "modifiers/m.gguf": random.Random(1).randbytes(5000),
    "difficulty.safetensors": b"d",
    "router.safetensors": b"r" * 3000,
    "calibration.json": b'{"threshold": 0.8}',
    "README.md": b"# A card\n" * 50,
}


def write(folder, content):
    for name, value in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value)
    return folder


def content_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def make_plain(root):
    """A valid bundle of synthetic bytes, whose models cannot be opened."""
    write(root / "sources", CONTENT)
    write_bundle(root / "bundle", {name: root / "sources" / name for name in CONTENT}, {"parts": PARTS})
    return root / "bundle"


def make_packed(plain):
    """Pack the bundle into a folder beside it."""
    with staged(plain.with_name("packed"), plain) as part:
        pack_folder(plain, part, Config())
    return plain.with_name("packed")
