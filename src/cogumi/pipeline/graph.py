"""The dependency graph of steps: execution order, cycles, and the number of steps that can run at once. Pure functions.

A graph maps each step to the steps it depends on. Its keys are in the recipe's order.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Graph = Mapping[str, Collection[str]]


def in_order(graph: Graph) -> list[str]:
    """All steps in topological order; the order of the recipe where the dependencies leave a choice.

    Raises `ValueError` with the steps of a cycle.
    """
    order: dict[str, None] = {}
    left = list(graph)
    while left:
        step = next((step for step in left if all(needed in order for needed in graph[step])), None)
        if step is None:
            chain = " and ".join(f"'{one}' needs '{other}'" for one, other in _cycle(graph, left))
            raise ValueError(f"the steps form a cycle: {chain}; remove one of these inputs")
        order[step] = None
        left.remove(step)
    return list(order)


def _cycle(graph: Graph, stuck: list[str]) -> list[tuple[str, str]]:
    """A cycle as pairs (step, dependency); each of `stuck` depends on at least one other of them."""
    path = [stuck[0]]
    while True:
        step = next(needed for needed in graph[path[-1]] if needed in stuck)
        if step in path:
            path = path[path.index(step) :]
            return list(zip(path, [*path[1:], step], strict=True))
        path.append(step)


def _before(graph: Graph) -> dict[str, set[str]]:
    """For each step all steps that must run before it."""
    before: dict[str, set[str]] = {}
    for step in in_order(graph):
        before[step] = set(graph[step]).union(*(before[needed] for needed in graph[step]))
    return before


def beside(graph: Graph) -> dict[str, set[str]]:
    """For each step the steps that may run at the same time: neither before nor after it."""
    before = _before(graph)
    return {
        step: {other for other in graph if other != step and other not in before[step] and step not in before[other]}
        for step in graph
    }


def width(graph: Graph) -> int:
    """The maximum number of steps that can run at once: the size of the largest antichain.

    By Dilworth's theorem it is the number of steps minus the size of a maximum matching of the relation "must run
    before", computed with Kuhn's algorithm.
    """
    before = _before(graph)
    successor: dict[str, str] = {}

    def find_predecessor(step: str, tried: set[str]) -> bool:
        for earlier in before[step] - tried:
            tried.add(earlier)
            if earlier not in successor or find_predecessor(successor[earlier], tried):
                successor[earlier] = step
                return True
        return False

    return len(graph) - sum(find_predecessor(step, set()) for step in graph)
