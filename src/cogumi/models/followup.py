"""The net that notices a dissatisfied follow-up (SPEC F7): word vectors of a sentence encoder, an LSTM, one logit.

The word vectors are the encoder's own (its input embeddings, by principal components, as 8-bit integers) and stay as
they are, so a word that training never showed still lies near its synonyms. Hochreiter and Schmidhuber 1997 (LSTM).
The ONNX graph is written node by node: no exporter, and the same net gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cogumi.models.encoder import Encoder

Row = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Word ids and marks [tokens] of one turn, as `runtime.escalation.encode` makes them."""

Figure = Callable[[NDArray[np.bool_], NDArray[np.bool_]], float]
"""A figure of merit of what is positive and what was called so."""

PADDING = 0
OPSET, IR = 17, 8
"""Versions of the graph: what ONNX Runtime has read since 2022."""


def word_vectors(encoder: Encoder, tokenizer: Any, width: int) -> tuple[list[str], Tensor, Tensor]:
    """A vocabulary with its vectors: words, int8 [2 + words, width], scales [width]; rows 0 and 1 are nothing (padding
    and what is in no vocabulary).

    Marks of word pieces are dropped, special tokens left out; of tokens with the same letters the first one stays.
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
    table = torch.cat([torch.zeros(2, width), (x / step).round()]).to(torch.int8)
    return list(rows), table, (step / x.std()).float()


class FollowUpNet(nn.Module):
    """`table` int8 [words, width] with its `scale` [width]; `marks` kinds of marks; `hidden` units of the LSTM.

    The logit is read from the mean and the maximum of the states over the follow-up, and from the cosine of the
    follow-up's words to the question's and to the answer's; which words count there is learned.
    """

    table: Tensor
    scale: Tensor

    def __init__(self, table: Tensor, scale: Tensor, marks: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("scale", scale)
        self.marks = nn.Embedding(marks, 8)
        self.weight = nn.Linear(len(scale), 1)
        self.lstm = nn.LSTM(len(scale) + 8, hidden, batch_first=True)
        self.head = nn.Linear(2 * hidden + 2, 1)
        self.dropout = dropout

    def forward(self, ids: Tensor, marks: Tensor) -> Tensor:
        """Ids and marks [rows, tokens], padded with 0 at the end -> logits [rows]."""
        x = self.table[ids].float() * self.scale
        if self.training:  # words are left out, so that no single one decides
            x = x * (torch.rand(ids.shape) >= self.dropout)[..., None]
        states, _ = self.lstm(torch.cat([x, self.marks(marks)], dim=-1))
        question, answer, follow_up = (((marks - 1) // 4 == who)[..., None].float() for who in range(3))
        mean = (states * follow_up).sum(dim=1) / follow_up.sum(dim=1)
        top = (states * follow_up - (1 - follow_up)).amax(dim=1)  # states lie in (-1, 1)
        x = x * torch.sigmoid(self.weight(x))
        sums = [nn.functional.normalize((x * said).sum(dim=1), dim=-1) for said in (question, answer, follow_up)]
        near = [(sums[2] * other).sum(dim=-1) for other in sums[:2]]
        read = torch.cat([mean, top, torch.stack(near, dim=-1)], dim=-1)
        logits: Tensor = self.head(nn.functional.dropout(read, self.dropout, self.training))[:, 0]
        return logits


def fit(
    net: FollowUpNet,
    rows: Sequence[Row],
    targets: NDArray[np.float32],
    *,
    epochs: int,
    lr: float,
    seed: int,
    batch: int = 64,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> None:
    """Train on probabilities [rows] by cross-entropy (AdamW, one cycle); the same seed gives the same net.

    Rows of like length share a batch; `progress` is told batches done and in all, and the last loss.
    """
    order = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.01)
    total, done = epochs * -(-len(rows) // batch), 0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total, pct_start=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net.train()
        for _ in range(epochs):
            for chosen in batches([len(ids) for ids, _ in rows], batch, order):
                ids, marks = pad([rows[i] for i in chosen])
                loss = nn.functional.binary_cross_entropy_with_logits(
                    net(ids, marks), torch.from_numpy(targets[chosen])
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                done += 1
                progress(done, total, loss.item())
    net.eval()


def batches(lengths: Sequence[int], batch: int, order: np.random.Generator) -> list[NDArray[np.int64]]:
    """Every row once: shuffled, then by length within pools of 32 batches, then the batches shuffled."""
    shuffled = order.permutation(len(lengths))
    pools = [shuffled[i : i + 32 * batch] for i in range(0, len(shuffled), 32 * batch)]
    found = []
    for pool in pools:
        pool = pool[np.argsort([lengths[i] for i in pool], kind="stable")]
        found += [pool[i : i + batch] for i in range(0, len(pool), batch)]
    return [found[i] for i in order.permutation(len(found))]


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Ids and marks [rows, longest], 0 behind the end."""
    ids, marks = (nn.utils.rnn.pad_sequence([torch.from_numpy(r[k]) for r in rows], True, PADDING) for k in (0, 1))
    return ids, marks


def best_threshold(p: NDArray[np.float64], positive: NDArray[np.bool_], figure: Figure) -> float:
    """The value of `p` [rows] from which on to call a row positive, by the greatest figure(positive, called)."""
    cuts = np.unique(np.quantile(p, np.linspace(0, 1, 201)))
    return float(max(cuts, key=lambda cut: figure(positive, p >= cut)))


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
        "w": gates("weight_ih_l0")[None],
        "r": gates("weight_hh_l0")[None],
        "b": np.concatenate([gates("bias_ih_l0"), gates("bias_hh_l0")]).reshape(1, -1),
        "weight_w": net.weight.weight.detach().numpy().T,
        "weight_b": net.weight.bias.detach().numpy(),
        "head_w": net.head.weight.detach().numpy().T,
        "head_b": net.head.bias.detach().numpy(),
        "one": np.array(1, dtype=np.int64),
        "four": np.array(4, dtype=np.int64),
        "unit": np.array(1, dtype=np.float32),
        "tiny": np.array(1e-12, dtype=np.float32),
        "axis1": np.array([1], dtype=np.int64),
        "axis2": np.array([2], dtype=np.int64),
        **{f"who{who}": np.array(who, dtype=np.int64) for who in range(3)},
    }
    nodes = _nodes(hidden)
    tokens = [helper.make_tensor_value_info(name, TensorProto.INT64, [1, "tokens"]) for name in ("ids", "marks")]
    result = [helper.make_tensor_value_info("p", TensorProto.FLOAT, [1])]
    initializers = [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "follow-up", tokens, result, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR)
    helper.set_model_props(model, dict(metadata))
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString(deterministic=True))


def _nodes(hidden: int) -> list[Any]:
    """The graph of `FollowUpNet.forward` for one row; names on the left of the arrow are inputs."""
    from onnx import helper

    def node(kind: str, names: str, **attributes: Any) -> Any:
        inputs, outputs = (side.split() for side in names.split("->"))
        return helper.make_node(kind, inputs, outputs, **attributes)

    nodes = [
        node("Gather", "table ids -> rows"),
        node("Cast", "rows -> floats", to=1),
        node("Mul", "floats scale -> x"),
        node("Gather", "mark_table marks -> m"),
        node("Concat", "x m -> read", axis=2),
        node("Transpose", "read -> steps", perm=[1, 0, 2]),
        helper.make_node("LSTM", ["steps", "w", "r", "b"], ["all_states"], hidden_size=hidden),
        node("Squeeze", "all_states axis1 -> by_step"),
        node("Transpose", "by_step -> states", perm=[1, 0, 2]),
        node("Sub", "marks one -> from_zero"),
        node("Div", "from_zero four -> speaker"),
        node("MatMul", "x weight_w -> weight_x"),
        node("Add", "weight_x weight_b -> weight_z"),
        node("Sigmoid", "weight_z -> weight"),
        node("Mul", "x weight -> weighted"),
    ]
    for who in range(3):
        nodes += [
            node("Equal", f"speaker who{who} -> is{who}"),
            node("Cast", f"is{who} -> flag{who}", to=1),
            node("Unsqueeze", f"flag{who} axis2 -> said{who}"),
            node("Mul", f"weighted said{who} -> words{who}"),
            node("ReduceSum", f"words{who} axis1 -> sum{who}", keepdims=0),
            node("ReduceL2", f"sum{who} -> long{who}", axes=[1], keepdims=1),
            node("Max", f"long{who} tiny -> length{who}"),
            node("Div", f"sum{who} length{who} -> unit{who}"),
        ]
    for who in range(2):
        nodes += [
            node("Mul", f"unit{who} unit2 -> products{who}"),
            node("ReduceSum", f"products{who} axis1 -> near{who}", keepdims=1),
        ]
    return [
        *nodes,
        node("Mul", "states said2 -> kept"),
        node("ReduceSum", "kept axis1 -> total", keepdims=0),
        node("ReduceSum", "said2 axis1 -> count", keepdims=0),
        node("Div", "total count -> mean"),
        node("Sub", "unit said2 -> others"),
        node("Sub", "kept others -> lowered"),
        node("ReduceMax", "lowered -> top", axes=[1], keepdims=0),
        node("Concat", "mean top near0 near1 -> features", axis=1),
        node("MatMul", "features head_w -> product"),
        node("Add", "product head_b -> logit"),
        node("Sigmoid", "logit -> column"),
        node("Squeeze", "column axis1 -> p"),
    ]
