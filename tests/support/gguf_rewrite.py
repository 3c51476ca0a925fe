"""Copies of a GGUF file with other keys or tensors."""

from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFWriter


def rewritten(source: Path, target: Path, *, drop=(), without=(), tensors=(), **keys) -> Path:
    """Copy `source` with keys replaced or added (`__` stands for a dot) or dropped, and tensors left out or added."""
    reader, changed = GGUFReader(source), {name.replace("__", "."): value for name, value in keys.items()}
    architecture = changed.pop("general.architecture", reader.get_field("general.architecture").contents())
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in (*changed, *drop, "general.architecture"):
            own = name.replace("llama.", f"{architecture}.", 1) if name.startswith("llama.") else name
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(own, field.contents(), field.types[0], sub)
    for name, value in changed.items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(name, value)
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name in tensors:
        writer.add_tensor(name, np.zeros((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
