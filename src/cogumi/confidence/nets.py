"""Small feed-forward nets in numpy: the gates, the domain router (SPEC F5), the difficulty head (SPEC F1).

Inference only; needs no training library. Weights are float32, stored as safetensors, or as JSON inside a calibration.
ReLU between layers, logits as output; inputs are standardised by the net's own mean and scale.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cogumi.core.errors import BundleError

Floats = NDArray[np.float32]


def sigmoid(z: ArrayLike) -> NDArray[np.float64]:
    """1 / (1 + exp(-z)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * np.asarray(z, dtype=np.float64))))


def softmax(z: ArrayLike) -> NDArray[np.float64]:
    """Probabilities along the last axis."""
    logits: NDArray[np.float64] = np.asarray(z, dtype=np.float64)
    powers = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True, eq=False)
class Net:
    """`layers` holds (weight [in, out], bias [out]) pairs; `classes` names the outputs of a classifier.

    A binary classifier may have one output: the logit of its second class.
    """

    mean: Floats
    scale: Floats
    layers: tuple[tuple[Floats, Floats], ...]
    classes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        mean: ArrayLike,
        scale: ArrayLike,
        weights: Sequence[ArrayLike],
        biases: Sequence[ArrayLike],
        classes: Sequence[str] = (),
    ) -> Net:
        """Make a float32 net of arrays. Raises ValueError if the shapes of consecutive layers do not match."""
        layers = tuple((_f32(w), _f32(b)) for w, b in zip(weights, biases, strict=True))
        net = cls(_f32(mean), _f32(scale), layers, tuple(classes))
        width = len(net.mean)
        for weight, bias in layers:
            if weight.shape != (width, len(bias)):
                raise ValueError(f"a layer of shape {weight.shape} cannot follow {width} values")
            width = len(bias)
        if net.scale.shape != net.mean.shape or (net.classes and width not in (len(net.classes), 1)):
            raise ValueError(f"{width} outputs for {len(net.classes)} classes")
        return net

    def logits(self, x: ArrayLike) -> NDArray[np.float64]:
        """Rows [n, in] (or one row [in]) to logits [n, out] ([out])."""
        h: NDArray[Any] = (np.asarray(x, dtype=np.float64) - self.mean) / self.scale
        for i, (weight, bias) in enumerate(self.layers):
            h = (np.maximum(h, 0.0) if i else h) @ weight + bias
        return np.asarray(h)

    def probabilities(self, x: ArrayLike) -> dict[str, float]:
        """One row [in] to a probability per class."""
        z = self.logits(x)
        p = softmax(np.array([0.0, z[0]]) if len(z) == 1 and len(self.classes) == 2 else z)
        return {name: float(value) for name, value in zip(self.classes, p, strict=True)}

    def to_json(self) -> dict[str, Any]:
        """JSON values that `from_json` turns into exactly the same net."""
        return {
            "mean": _pack(self.mean),
            "scale": _pack(self.scale),
            "weights": [_pack(weight) for weight, _ in self.layers],
            "biases": [_pack(bias) for _, bias in self.layers],
            "classes": list(self.classes),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Net:
        """Inverse of `to_json`."""
        return cls.of(
            _unpack(value["mean"]),
            _unpack(value["scale"]),
            [_unpack(weight) for weight in value["weights"]],
            [_unpack(bias) for bias in value["biases"]],
            value["classes"],
        )

    def save(self, path: Path, *, scope: float = 0.0) -> None:
        """Write a safetensors file with the class names as metadata; for `scope` (0: no limit) see `domain_router`."""
        from safetensors.numpy import save_file

        tensors = {"mean": self.mean, "scale": self.scale, "scope": _f32([scope])}
        for i, (weight, bias) in enumerate(self.layers):
            tensors |= {f"weight_{i}": weight, f"bias_{i}": bias}
        save_file(tensors, path, metadata={"classes": json.dumps(self.classes)})


def _f32(x: ArrayLike) -> Floats:
    return np.ascontiguousarray(np.asarray(x, dtype=np.float32))


def _pack(x: Floats) -> dict[str, Any]:
    """Base64 of little-endian float32: exact, and a fifth of the size of decimal numbers."""
    return {"shape": list(x.shape), "float32": base64.b64encode(x.astype("<f4").tobytes()).decode("ascii")}


def _unpack(value: Mapping[str, Any]) -> Floats:
    data = base64.b64decode(value["float32"], validate=True)
    return _f32(np.frombuffer(data, dtype="<f4").reshape(value["shape"]))


def _tensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise BundleError(f"cannot read the net {path}: {error}; build the bundle again") from error


def load_net(path: Path) -> Net:
    """Load a net written by `Net.save`; `BundleError` if the file is not a valid net."""
    tensors, metadata = _tensors(path)
    depth = sum(name.startswith("weight_") for name in tensors)
    try:
        return Net.of(
            tensors["mean"],
            tensors["scale"],
            [tensors[f"weight_{i}"] for i in range(depth)],
            [tensors[f"bias_{i}"] for i in range(depth)],
            json.loads(metadata["classes"]),
        )
    except (KeyError, ValueError) as error:
        raise BundleError(f"{path} is not a net of this version ({error}); build the bundle again") from error


def load_scope(path: Path) -> float:
    """The scope saved with a net; 0 (no limit) if the file has none. Raises `BundleError`."""
    tensors, _ = _tensors(path)
    return float(np.ravel(tensors.get("scope", 0.0))[0])


def save_head(weight: ArrayLike, bias: float, path: Path) -> None:
    """Write a linear head with one logit, from hidden states as they are: `weight` [width] and `bias`."""
    from safetensors.numpy import save_file

    save_file({"weight": _f32(weight), "bias": _f32([bias])}, path)


def load_head(path: Path) -> Net:
    """Load a linear head with one logit, saved as `weight` [width] and `bias` [1]. Raises `BundleError`."""
    tensors, _ = _tensors(path)
    try:
        weight = np.asarray(tensors["weight"], dtype=np.float32).reshape(-1, 1)
        width = len(weight)
        return Net.of(np.zeros(width), np.ones(width), [weight], [np.reshape(tensors["bias"], 1)])
    except (KeyError, ValueError) as error:
        raise BundleError(f"{path} is not a head with one logit ({error}); build the bundle again") from error
