"""Split LoRA adapters into one shared update and a small head per adapter (SPEC C10).

Joint and individual variation explained (Lock et al., 1102.4110) on weight updates: minimise the sum over adapters of
|W_d - S - H_d|^2, where S has the shared rank and every H_d the heads' rank. Given the heads, the best S is the
truncated SVD of the mean of W_d - H_d; given S, the best H_d is that of W_d - S. Alternating the two never increases
the sum. The computation is exact in the small span of the adapters' factors, without full matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cogumi.models.lora_factors import Adapter, Factors

ROUNDS = 30

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Span:
    """Updates of one layer as `left @ cores[d] @ right.T`; `left` and `right` have orthonormal columns."""

    left: Tensor
    right: Tensor
    cores: Tensor

    @classmethod
    def of(cls, updates: Sequence[Factors]) -> Span:
        """The common span of updates of one shape; computed in float64."""
        left = torch.linalg.qr(torch.cat([f.b.double() for f in updates], dim=1)).Q
        right = torch.linalg.qr(torch.cat([f.a.double() for f in updates]).T).Q
        cores = [(left.T @ f.b.double()) @ (f.a.double() @ right) for f in updates]
        return cls(left, right, torch.stack(cores))

    def factors(self, core: Tensor, rank: int) -> Factors:
        """The best update of that rank for a core, padded with zeros; both factors carry the singular values' roots."""
        u, s, vt = torch.linalg.svd(core, full_matrices=False)
        root = s[:rank].sqrt()
        b, a = self.left @ (u[:, :rank] * root), (root[:, None] * vt[:rank]) @ self.right.T
        missing = rank - b.shape[1]
        b, a = torch.nn.functional.pad(b, (0, missing)), torch.nn.functional.pad(a, (0, 0, 0, missing))
        return Factors(a.float(), b.float())


def truncated(cores: Tensor, rank: int) -> Tensor:
    """The best approximations of that rank: `[..., n, m]` -> the same shape."""
    u, s, vt = torch.linalg.svd(cores, full_matrices=False)
    nearest: Tensor = (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]
    return nearest


def split(cores: Tensor, rank: int, head: int, rounds: int = ROUNDS) -> tuple[Tensor, Tensor]:
    """Shared core `[n, m]` of rank `rank` and heads `[adapters, n, m]` of rank `head`; the sums approximate `cores`."""
    heads = torch.zeros_like(cores)
    for _ in range(rounds):
        shared = truncated((cores - heads).mean(0), rank)
        heads = truncated(cores - shared, head)
    return shared, heads


def spans(adapters: Mapping[str, Adapter]) -> dict[str, Span]:
    """The span of all adapters on each layer."""
    layers = next(iter(adapters.values()))
    return {layer: Span.of([adapter[layer] for adapter in adapters.values()]) for layer in layers}


def gram(found: Mapping[str, Span]) -> Doubles:
    """Inner products `[adapters, adapters]` of the updates, summed over layers."""
    flat = torch.cat([span.cores.flatten(1) for span in found.values()], dim=1)
    product: Doubles = (flat @ flat.T).numpy()
    return product


def cosines(products: Doubles) -> Doubles:
    """Cosines from inner products; 0 where a vector is zero."""
    length = np.sqrt(np.diag(products))
    scale = np.outer(length, length)
    found: Doubles = np.divide(products, scale, out=np.zeros_like(products), where=scale > 0)
    return found


def explained(products: Doubles) -> list[float]:
    """Shares of the squared norm of all updates along their principal directions (PCA without centring)."""
    values = np.linalg.eigvalsh(products)[::-1].clip(min=0)
    return [float(v) for v in values / values.sum()] if values.sum() else [0.0] * len(values)


def clusters(similarity: Doubles, threshold: float) -> list[int]:
    """Cluster number of each item: average linkage of the similarities `[n, n]`, cut at `threshold`."""
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    distance = (1 - (similarity + similarity.T) / 2).clip(min=0)
    np.fill_diagonal(distance, 0)
    numbers = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - threshold, "distance")
    order = list(dict.fromkeys(numbers.tolist()))
    return [order.index(n) + 1 for n in numbers.tolist()]
