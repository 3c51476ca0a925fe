"""Which type llama.cpp would give each tensor of a model, told from its shape alone (SPEC D1, D5).

llama.cpp's own quantizer is asked, in a dry run over a file that has a header and no weights: sparse, so that it takes
no room on disk whatever the model's size.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType

from cogumi.compress.layout import Llama
from cogumi.runtime.llama.quantize import mixture


def types_of(llama: Llama, type: str, importance: bool = False) -> dict[str, GGMLQuantizationType]:
    """The type of each tensor, by its GGUF name, of a model that llama.cpp quantizes to `type` (`q4_k_m`, ...).

    Raises `ExportError` for an unknown type and for one that needs an importance matrix where there is none.
    """
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder) / "header.gguf"
        _write_header(llama, header)
        return {name: GGMLQuantizationType[chosen] for name, chosen in mixture(header, type, importance).items()}


def _write_header(llama: Llama, path: Path) -> None:
    writer = GGUFWriter(path, llama.kind)
    writer.add_type(GGUFType.MODEL)
    writer.add_file_type(LlamaFileType.ALL_F32)
    llama.write(writer)
    size = 0
    for tensor in llama.tensors():
        tensor.announce(writer)
        size += -(-tensor.nbytes // writer.data_alignment) * writer.data_alignment
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    end = path.stat().st_size
    os.truncate(path, -(-end // writer.data_alignment) * writer.data_alignment + size)
