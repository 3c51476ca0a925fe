"""Classifier of dissatisfied follow-ups (SPEC F7): word vectors of a sentence encoder, an LSTM, one logit.

The word vectors are the encoder's input embeddings, reduced by PCA and stored as 8-bit integers. They are not trained,
so that words absent from the training data stay close to their synonyms. Hochreiter and Schmidhuber 1997 (LSTM). The
ONNX graph is written node by node, so that the same net gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cogumi.models.encoder import Encoder

Row = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Word ids and marks [tokens] of one turn, from `cascade.dissatisfaction.encode`."""

WIDTH, HIDDEN = 72, 96
"""Default sizes of word vectors and LSTM: with MiniLM's vocabulary the file stays below 3 MB."""

PADDING = 0
OPSET, IR = 17, 8
"""Versions of the graph, supported by ONNX Runtime since 2022."""


def word_vectors(encoder: Encoder, tokenizer: Any, width: int) -> tuple[list[str], Tensor, Tensor]:
    """A vocabulary and its vectors: words, int8 [2 + words, width], scales [width]. Rows 0 (padding) and 1 (unknown
    words) are zero; `width` is at most the encoder's.

    Word-piece prefixes are removed and special tokens omitted; of tokens with the same letters the first is kept.
    """
    vectors: Tensor = encoder.model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokens: dict[str, int] = tokenizer.get_vocab()
    rows: dict[str, int] = {}
    for token, row in sorted(tokens.items(), key=lambda item: item[1]):
        word = token.lower().removeprefix("##").lstrip("▁Ġ")
        if word and not (token[0] in "[<" and token[-1] in "]>" and len(token) > 2):
            rows.setdefault(word, row)
    x = vectors[list(rows.values())].double()
    x = x - x.mean(dim=0)
    _, axes = torch.linalg.eigh(x.T @ x)
    x = x @ axes.flip(1)[:, :width]
    step = x.abs().amax(dim=0) / 127
    table = torch.cat([torch.zeros(2, x.shape[1]), (x / step).round()]).to(torch.int8)
    return list(rows), table, (step / x.std()).float()


class FollowUpNet(nn.Module):
    """`table` int8 [words, width] with its `scale` [width]; `marks`: number of marks; `hidden` units of the LSTM.

    The LSTM reads the follow-up. Features are the mean and maximum of its states, the directions of the weighted mean
    word vectors of question, answer and follow-up, and the cosines between them. The logit is a linear function of the
    features plus a weight per word and speaker (Cheng et al. 2016, wide and deep).
    """

    table: Tensor
    scale: Tensor

    def __init__(self, table: Tensor, scale: Tensor, marks: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scale", scale)
        width = len(scale)
        self.marks = nn.Embedding(marks, 8)
        self.weight = nn.Linear(width, 1)
        self.lstm = nn.LSTM(width + 8, hidden, batch_first=True)
        self.head = nn.Linear(2 * hidden + 3 * width + 2, 1)
        self.wide = nn.Embedding(len(table), 3)
        nn.init.zeros_(self.wide.weight)
        self.dropout = dropout

    def forward(self, ids: Tensor, marks: Tensor) -> Tensor:
        """Ids and marks [rows, tokens], the follow-up first, padded with 0 at the end -> logits [rows]."""
        known = torch.ones(ids.shape)
        if self.training:  # word dropout
            known = (torch.rand(ids.shape) >= self.dropout).float()
        x = self.table[ids] * self.scale * known[..., None]
        speaker = torch.stack([(marks - 1) // 4 == who for who in range(3)], dim=-1).float()  # [rows, tokens, 3]
        counts = speaker.sum(dim=1).clamp(min=1)
        length = int(counts[:, 2].max())
        follow_up = speaker[:, :length, 2:]
        states, _ = self.lstm(torch.cat([x, self.marks(marks)], dim=-1)[:, :length])
        mean = (states * follow_up).sum(dim=1) / counts[:, 2:]
        top = (states * follow_up - (1 - follow_up)).amax(dim=1)  # states lie in (-1, 1)
        weighted = x * torch.sigmoid(self.weight(x))
        units = nn.functional.normalize(speaker.transpose(1, 2) @ weighted, dim=-1)  # [rows, 3, width]
        near = (units[:, :2] * units[:, 2:]).sum(dim=-1)
        read = torch.cat([mean, top, units.flatten(1), near], dim=-1)
        wide = (self.wide(ids) * speaker * known[..., None]).sum(dim=1) / counts.sqrt()
        logits: Tensor = self.head(nn.functional.dropout(read, self.dropout, self.training))[:, 0] + wide.sum(dim=-1)
        return logits


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Ids and marks [rows, longest], padded with 0 at the end."""
    ids, marks = (nn.utils.rnn.pad_sequence([torch.from_numpy(r[k]) for r in rows], True, PADDING) for k in (0, 1))
    return ids, marks


def export(net: FollowUpNet, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the net as ONNX: `ids` and `marks` int64 [1, tokens] -> `p` [1], the probability."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    lstm = dict(net.lstm.named_parameters())
    hidden = net.lstm.hidden_size

    def gates(name: str) -> NDArray[np.float32]:  # torch orders the gates i f g o, ONNX i o f g
        i, f, g, o = lstm[name].detach().numpy().reshape(4, hidden, -1)
        return np.concatenate([i, o, f, g])

    constants: dict[str, NDArray[Any]] = {
        "table": net.table.numpy(),
        "scale": net.scale.numpy(),
        "mark_table": net.marks.weight.detach().numpy(),
        "wide_table": net.wide.weight.detach().numpy(),
        "w": gates("weight_ih_l0")[None],
        "r": gates("weight_hh_l0")[None],
        "b": np.concatenate([gates("bias_ih_l0"), gates("bias_hh_l0")]).reshape(1, -1),
        "weight_w": net.weight.weight.detach().numpy().T,
        "weight_b": net.weight.bias.detach().numpy(),
        "head_w": net.head.weight.detach().numpy().T,
        "head_b": net.head.bias.detach().numpy(),
        "speakers": np.arange(3, dtype=np.int64),
        "one": np.array(1, dtype=np.int64),
        "four": np.array(4, dtype=np.int64),
        "unit": np.array(1, dtype=np.float32),
        "tiny": np.array(1e-12, dtype=np.float32),
        "flat": np.array([1, -1], dtype=np.int64),
        **{f"at{i}": np.array([i], dtype=np.int64) for i in range(4)},
    }
    tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "tokens"]) for name in ("ids", "marks")]
    result = [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1])]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(_nodes(hidden), "follow-up", tokens, result, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _node(kind: str, names: str, **attributes: Any) -> Any:
    """An ONNX node; `names` holds its inputs, an arrow, and its outputs."""
    from onnx import helper

    inputs, outputs = (side.split() for side in names.split("->"))
    return helper.make_node(kind, inputs, outputs, **attributes)


def _nodes(hidden: int) -> list[Any]:
    """The graph of `FollowUpNet.forward` for one row."""
    from onnx import TensorProto

    return [
        _node("Gather", "table ids -> rows"),
        _node("Cast", "rows -> floats", to=TensorProto.FLOAT),
        _node("Mul", "floats scale -> x"),
        # speaker of each token [1, tokens, 3], and tokens per speaker
        _node("Sub", "marks one -> from_zero"),
        _node("Div", "from_zero four -> who"),
        _node("Unsqueeze", "who at2 -> who_column"),
        _node("Equal", "who_column speakers -> is_speaker"),
        _node("Cast", "is_speaker -> speaker", to=TensorProto.FLOAT),
        _node("ReduceSum", "speaker at1 -> found", keepdims=0),
        _node("Max", "found unit -> counts"),
        _node("Slice", "counts at2 at3 at1 -> length"),
        _node("Cast", "length -> length_column", to=TensorProto.INT64),
        _node("Squeeze", "length_column at0 -> end"),
        # the LSTM over the follow-up
        _node("Gather", "mark_table marks -> m"),
        _node("Concat", "x m -> read", axis=2),
        _node("Slice", "read at0 end at1 -> follow_up"),
        _node("Transpose", "follow_up -> steps", perm=[1, 0, 2]),
        _node("LSTM", "steps w r b -> by_direction", hidden_size=hidden),
        _node("Squeeze", "by_direction at1 -> states"),
        _node("ReduceMean", "states -> mean", axes=[0], keepdims=0),
        _node("ReduceMax", "states -> top", axes=[0], keepdims=0),
        # directions of question, answer and follow-up, and their cosines
        _node("MatMul", "x weight_w -> weight_x"),
        _node("Add", "weight_x weight_b -> weight_z"),
        _node("Sigmoid", "weight_z -> weight"),
        _node("Mul", "x weight -> weighted"),
        _node("Transpose", "speaker -> by_speaker", perm=[0, 2, 1]),
        _node("MatMul", "by_speaker weighted -> sums"),
        _node("ReduceL2", "sums -> norms", axes=[2], keepdims=1),
        _node("Max", "norms tiny -> lengths"),
        _node("Div", "sums lengths -> units"),
        _node("Slice", "units at0 at2 at1 -> others"),
        _node("Slice", "units at2 at3 at1 -> own"),
        _node("Mul", "others own -> products"),
        _node("ReduceSum", "products at2 -> near", keepdims=0),
        _node("Reshape", "units flat -> directions"),
        _node("Concat", "mean top directions near -> features", axis=1),
        _node("MatMul", "features head_w -> product"),
        _node("Add", "product head_b -> deep"),
        # weights by word and speaker
        _node("Gather", "wide_table ids -> word_weights"),
        _node("Mul", "word_weights speaker -> weights"),
        _node("ReduceSum", "weights at1 -> totals", keepdims=0),
        _node("Sqrt", "counts -> roots"),
        _node("Div", "totals roots -> shares"),
        _node("ReduceSum", "shares at1 -> wide", keepdims=1),
        _node("Add", "deep wide -> logit"),
        _node("Sigmoid", "logit -> column"),
        _node("Squeeze", "column at1 -> p"),
    ]
