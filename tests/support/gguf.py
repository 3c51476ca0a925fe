"""Helpers of the GGUF tests: stock llama.cpp, edits of a model folder, and text unlike any training data."""

from __future__ import annotations

import ctypes
import json
import os
import random
from collections.abc import Mapping
from pathlib import Path

import llama_cpp
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cogumi.engine.llama.binding.backend import compute
from support.pico import SENTENCES, SPECIALS

F32_CACHE = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: Path, change, name: str = "model.safetensors") -> None:
    weights = load_file(folder / name)
    change(weights)
    save_file(weights, folder / name)


def stock_quantize(source: Path, target: Path, type: str, importance: Mapping[str, np.ndarray] | None = None) -> None:
    """Quantize an f32 file with llama.cpp's own quantizer."""
    params = llama_cpp.llama_model_quantize_default_params()
    prefix = "LLAMA_FTYPE_ALL_" if type == "f32" else "LLAMA_FTYPE_MOSTLY_"
    params.ftype = getattr(llama_cpp, prefix + type.upper())
    if importance is not None:
        rows = (llama_cpp.llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
        for row, (name, columns) in zip(rows, importance.items(), strict=False):
            pointer = columns.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            row.name, row.data, row.size = name.encode(), pointer, columns.size
        params.imatrix = rows
    assert llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params)) == 0


def llama_logits(path: Path, ids: list[int], **options) -> np.ndarray:
    """Logits [ids, vocabulary] of stock llama.cpp."""
    model = llama(path, logits_all=True, **options)
    model.eval(ids)
    return np.array(model.scores[: len(ids)])


def torch_logits(model, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


def disagreement(model, path: Path, ids: list[int], **options) -> float:
    """Largest difference of logits, as a share of the largest logit; use more than 128 tokens to test RoPE scaling."""
    expected = torch_logits(model, ids)
    return float(np.abs(llama_logits(path, ids, **F32_CACHE, **options) - expected).max() / np.abs(expected).max())


def some_ids(count: int = 300, vocabulary: int = 512) -> list[int]:
    return random.Random(1).choices(range(5, vocabulary), k=count)


class _Llama(llama_cpp.Llama):
    """Stock llama.cpp, away from the thread in which the tests run torch: see `backend.compute`."""

    def eval(self, tokens):
        compute(1, lambda: super(_Llama, self).eval(tokens))


def llama(path: Path, **options) -> llama_cpp.Llama:
    return _Llama(str(path), verbose=False, n_threads=1, n_threads_batch=1, **{"n_ctx": 512} | options)


MULTILINGUAL = [
    "Ich hätte gern zwei Stück Käsekuchen, bitte – für 3,50 €.",
    "L'été, j'aime manger des crêpes à l'Orangerie; c'est l'idéal !",
    "¿Dónde está el baño? ¡Mañana será 29 de año!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю в 18:30.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία το 2024.",
    "今日は天気がいいですね。明日は2月29日です。",
    "我能吞下玻璃而不伤身体，价格是一百二十三元。",
    "다람쥐 헌 쳇바퀴에 타고파. 12시 30분.",
    "أنا قادر على أكل الزجاج و هذا لا يؤلمني ١٢٣٤٥.",
    "אני יכול לאכול זכוכית וזה לא מזיק לי.",
    "मैं काँच खा सकता हूँ, मुझे उस से कोई पीडा नहीं होती १२३.",
    "ฉันกินกระจกได้ แต่มันไม่ทำให้ฉันเจ็บ ๑๒๓",
    "Mogę jeść szkło i mi nie szkodzi, źdźbło żółci.",
    "Tôi có thể ăn thủy tinh mà không hại gì. Đường số 7.",
    "Cam yiyebilirim, bana zararı dokunmaz. İIıi ŞĞ",
    "আমি কাঁচ খেতে পারি, তাতে আমার কোনো ক্ষতি হয় না ১২৩",
    "நான் கண்ணாடி சாப்பிடுவேன் ௧௨௩",
    "მინას ვჭამ და არა მტკივა. Կրնամ ապակի ուտել ᎣᏏᏲ",
    "ſtraße ﬁne Ⅷ ½ ² ₃ ①⑳ ㊿ 𝟘𝟙𝟚 𝓗𝓮𝓵𝓵𝓸 Z͑ͫ̓a̴l̷g̶o̸ e\u0301 é",
]
CODE = [
    "def f(x: int) -> int:\n\t\treturn x**2 + 0x1F - 1_000  # comment\n",
    'for(int i=0;i<10;++i){ printf("%d\\n", a[i]); }',
    "SELECT * FROM t WHERE id != 42 AND name LIKE '%x%';",
    "<div class=\"a b\" id='c'>&nbsp;</div>\r\n\r\n",
    "x = {'a': [1, 2.5e-10, None], **kw}; y @= z >> 3",
    "#!/bin/sh\nset -e; echo \"$HOME/${x:-1}\" | grep -E '^[a-z]+' && exit 0",
]
EMOJI = ["🙂", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "👍🏽", "❤️", "1️⃣", "🤦🏿‍♂️", "☺", "🫠"]
CONTRACTIONS = ["I'm", "we'll", "you've", "they'd", "it's", "don't", "'S", "'LL", "o'clock's", "''re", "’s"]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\n\n\n",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u200b",
    "\x0b\x0c",
    "\x85",
    "\u2028",
]
CONTROL = [
    *SPECIALS,
    "<|pad|",
    "<|end|><|end|>",
    "<tool>",
    "</s>",
    "<|endoftext|>",
    "[PAD3]",
    "    <tool>    ",
]


def foreign_text(count: int) -> list[str]:
    """Seeded strings of many kinds that users may send and training sets do not contain."""
    draw = random.Random(20)
    words = [w for s in (*MULTILINGUAL, *CODE, *SENTENCES) for w in s.split(" ")]
    makers = [
        lambda: "".join(
            map(
                chr,
                (draw.choice((draw.randrange(0xD800), draw.randrange(0xE000, 0x110000))) for _ in range(20)),
            )
        ),
        lambda: "".join(chr(draw.randrange(0x20, 0x3000)) for _ in range(draw.randrange(1, 30))),
        lambda: "".join(chr(draw.randrange(256)) for _ in range(draw.randrange(1, 40))),
        lambda: " ".join(draw.choices(words, k=draw.randrange(1, 12))),
        lambda: draw.choice(MULTILINGUAL)[draw.randrange(10) :] + draw.choice(CODE),
        lambda: "".join(draw.choices([*SPACES, "a", "1", "!", "é"], k=draw.randrange(1, 30))),
        lambda: "".join(draw.choices("0123456789.,-+ ٣५Ⅷ½²", k=draw.randrange(1, 30))),
        lambda: "".join(draw.choices([*EMOJI, *CONTRACTIONS, " ", "7"], k=draw.randrange(1, 12))),
        lambda: "".join(draw.choices([*CONTROL, *words[:50], *SPACES], k=draw.randrange(1, 8))),
    ]
    return [draw.choice(makers)() for _ in range(count)]
