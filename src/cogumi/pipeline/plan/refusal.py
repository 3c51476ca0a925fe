"""The message for a budget that no route fits: the arithmetic, and the largest model that would fit (SPEC D1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cogumi.compress.gguf.planned_files import known_weights
from cogumi.core.amounts import size
from cogumi.core.shapes import KNOWN
from cogumi.pipeline.plan.bundle_memory import bytes_per_token
from cogumi.pipeline.plan.routes import Route, RouteSearch

FLOOR = 1.5625
"""Bits per weight of the smallest type (IQ1_S); whole files have more, because some tensors use larger types."""


@dataclass(frozen=True, slots=True)
class Limit:
    """One part of a budget: `given` bytes `where`, of which everything but the base's weights takes `beside` (by name);
    `weights` are the bytes of the base's weights.
    """

    where: str
    given: int
    weights: int
    beside: Mapping[str, int]

    @property
    def rest(self) -> int:
        """Bytes of everything but the weights."""
        return sum(self.beside.values())

    @property
    def shortage(self) -> float:
        """Needed bytes over given bytes."""
        return (self.weights + self.rest) / max(self.given, 1)


def refusal(search: RouteSearch) -> str:
    """One line: the tightest limit, the smallest possible bundle, and the largest model that would fit."""
    least = list(search.changes())[-1]
    smallest, whole = search.route(least), search.route(replace(least, layers=1.0, neurons=1.0))
    limits = zip(_limits(smallest), _limits(whole), strict=True)
    _, limit = max(limits, key=lambda pair: pair[0].shortage)
    reason = _too_much_beside(search, limit) if limit.rest > limit.weights else _too_few_bits(search, limit)
    found = [
        f"{search.parts.name}: {reason}",
        f"even with {', '.join(smallest.changes)} it is {', '.join(smallest.missed)}",
    ]
    other = alternative(search)
    return "; ".join([*found, f"what fits instead: {other}" if other else "nothing of known shape fits either"])


def _limits(route: Route) -> Iterator[Limit]:
    """A limit for each given part of the budget."""
    budget, parts, memory = route.budget, route.parts, route.memory
    base, read = parts.base.file.bytes, parts.base.file.read
    if budget.disk is not None:
        yield Limit("on disk", budget.disk, base, {"the draft, adapters and small files": parts.bytes - base})
    if budget.ram is not None:
        beside = {
            f"the cache of {_tokens(route)} tokens": memory.cache,
            "compute buffers": memory.buffers,
            "the draft": memory.weights - base,
            "adapters with their caches": memory.adapters,
            "small nets": memory.nets,
            "Python with its libraries": memory.program,
        }
        yield Limit("in memory", budget.ram, base, beside)
    if budget.tokens_per_second and route.bandwidth:
        cache = {f"the cache of {_tokens(route)} tokens, half full,": bytes_per_token(parts, route.serving) - read}
        yield Limit(
            "to read for each token", int(route.reached * route.bandwidth / budget.tokens_per_second), read, cache
        )


def _tokens(route: Route) -> str:
    """The number of tokens in the caches, as text."""
    slots = f"{route.serving.slots} times " if route.serving.slots > 1 else ""
    return f"{slots}{route.serving.context:,}"


def _too_much_beside(search: RouteSearch, limit: Limit) -> str:
    name, taken = max(limit.beside.items(), key=lambda part: part[1])
    use = f"{name} takes {size(taken)}" if "cache of" in name else f"{name} take {size(taken)}"
    if "cache" not in name:
        return f"{use}, and there are {size(limit.given)} {limit.where}"
    ways = ["less --context"]
    ways += ["fewer --slots"] * (search.serving.slots > 1) + ["--cache q4_0"] * (search.serving.cache != "q4_0")
    return f"{use}, and there are {size(limit.given)} {limit.where}; ask for {' or '.join(ways)}"


def _too_few_bits(search: RouteSearch, limit: Limit) -> str:
    weights, room = search.parts.base.shape.parameters, max(limit.given - limit.rest, 0)
    bits = 8 * room / weights
    if bits < 0.01:
        return f"{size(limit.given)} {limit.where} leave no room for {weights:.3g} weights"
    beside = f", less {size(limit.rest)} for everything but weights," if limit.rest else ""
    share = f"{size(limit.given)} {limit.where}{beside} for {weights:.3g} weights are {bits:.2f} bits each"
    return f"{share}, and the smallest type has {FLOOR:.2f}" if bits < FLOOR else share


def alternative(search: RouteSearch) -> str | None:
    """The largest model of known shape that fits as the base without shrinking, with the needed changes."""
    for name, shape in sorted(KNOWN.items(), key=lambda item: item[1].parameters, reverse=True):
        if shape.parameters >= search.parts.base.shape.parameters or shape.context < search.serving.context:
            continue
        parts = replace(search.parts, name=name, base=known_weights(shape), shared=False)
        other = replace(search, parts=parts)
        whole = [change for change in other.changes() if change.layers == change.neurons == 1.0]
        if other.route(whole[-1]).missed:
            continue
        route = next(r for change in whole if not (r := other.route(change)).missed)
        how = ", ".join(route.changes) or f"as {route.parts.base.type}"
        return f"{name}, {how} ({size(route.parts.bytes)} on disk, {size(route.ram)} in memory)"
    return None
