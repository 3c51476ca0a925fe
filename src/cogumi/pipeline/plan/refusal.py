"""Why nothing fits a budget, with the arithmetic, and what would fit instead (SPEC D1)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from cogumi.compress.gguf.planned_files import known_weights
from cogumi.core.amounts import size
from cogumi.core.shapes import KNOWN
from cogumi.pipeline.plan.bundle_memory import bytes_per_token
from cogumi.pipeline.plan.routes import Asked, Route

FLOOR = 1.5625
"""Bits per weight of the smallest type there is (IQ1_S); files in it have more, for some of their tensors do."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What a budget leaves `where`: `given` bytes, of which `beside` (by name) are taken by what is no weight of the
    base; `weights` are those of the base.
    """

    where: str
    given: int
    weights: int
    beside: Mapping[str, int]

    @property
    def rest(self) -> int:
        """Bytes beside the weights."""
        return sum(self.beside.values())

    @property
    def shortage(self) -> float:
        """How many times what is given would be needed."""
        return (self.weights + self.rest) / max(self.given, 1)


def refusal(asked: Asked) -> str:
    """What stands in the way most, the smallest there could be, and what would fit instead, in a line."""
    least = list(asked.changes())[-1]
    smallest, whole = asked.route(least), asked.route(replace(least, layers=1.0, neurons=1.0))
    limits = zip(_limits(smallest), _limits(whole), strict=True)
    _, limit = max(limits, key=lambda pair: pair[0].shortage)
    said = _too_much_beside(asked, limit) if limit.rest > limit.weights else _too_few_bits(asked, limit)
    found = [
        f"{asked.parts.name}: {said}",
        f"even with {', '.join(smallest.changes)} it is {', '.join(smallest.missed)}",
    ]
    other = instead(asked)
    return "; ".join([*found, f"what fits instead: {other}" if other else "nothing of known shape fits either"])


def _limits(route: Route) -> Iterator[Limit]:
    """One for each part of the budget that is asked for."""
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
        yield Limit("to read for each token", int(route.bandwidth / budget.tokens_per_second), read, cache)


def _tokens(route: Route) -> str:
    """How many tokens the caches hold, in words."""
    slots = f"{route.serving.slots} times " if route.serving.slots > 1 else ""
    return f"{slots}{route.serving.context:,}"


def _too_much_beside(asked: Asked, limit: Limit) -> str:
    name, taken = max(limit.beside.items(), key=lambda part: part[1])
    said = f"{name} takes {size(taken)}" if "cache of" in name else f"{name} take {size(taken)}"
    if "cache" not in name:
        return f"{said}, and there are {size(limit.given)} {limit.where}"
    ways = ["less --context"]
    ways += ["fewer --slots"] * (asked.serving.slots > 1) + ["--cache q4_0"] * (asked.serving.cache != "q4_0")
    return f"{said}, and there are {size(limit.given)} {limit.where}; ask for {' or '.join(ways)}"


def _too_few_bits(asked: Asked, limit: Limit) -> str:
    weights, room = asked.parts.base.shape.parameters, max(limit.given - limit.rest, 0)
    bits = 8 * room / weights
    if bits < 0.01:
        return f"{size(limit.given)} {limit.where} leave no room for {weights:.3g} weights"
    beside = f", less {size(limit.rest)} that is no weight," if limit.rest else ""
    said = f"{size(limit.given)} {limit.where}{beside} for {weights:.3g} weights are {bits:.2f} bits each"
    return f"{said}, and the smallest type there is has {FLOOR:.2f}" if bits < FLOOR else said


def instead(asked: Asked) -> str | None:
    """The largest model of known shape that fits in the base's place, whole, and as what."""
    for name, shape in sorted(KNOWN.items(), key=lambda item: item[1].parameters, reverse=True):
        if shape.parameters >= asked.parts.base.shape.parameters or shape.context < asked.serving.context:
            continue
        parts = replace(asked.parts, name=name, base=known_weights(shape), shared=False)
        other = replace(asked, parts=parts)
        whole = [change for change in other.changes() if change.layers == change.neurons == 1.0]
        if other.route(whole[-1]).missed:
            continue
        route = next(r for change in whole if not (r := other.route(change)).missed)
        how = ", ".join(route.changes) or f"as {route.parts.base.type}"
        return f"{name}, {how} ({size(route.parts.bytes)} on disk, {size(route.ram)} in memory)"
    return None
