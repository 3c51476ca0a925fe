"""Steps as a graph: an order in which they can run, and how many can run at once.

A graph maps each step to the steps it waits for. Its keys are in the recipe's order. Everything here is pure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

Graph = Mapping[str, Collection[str]]


def in_order(graph: Graph) -> list[str]:
    """All steps, each after those it waits for; where several could come next, the recipe's first.

    Raises `ValueError` that names the steps of a cycle.
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
    """A cycle as (step, step it waits for); each of `stuck` waits for at least one other of them."""
    path = [stuck[0]]
    while True:
        step = next(needed for needed in graph[path[-1]] if needed in stuck)
        if step in path:
            path = path[path.index(step) :]
            return list(zip(path, [*path[1:], step], strict=True))
        path.append(step)


def width(graph: Graph) -> int:
    """The most steps that can run at once: the largest set of steps of which none waits for another.

    By Dilworth's theorem that is the number of steps minus a maximum matching of the relation "must run before",
    which Kuhn's algorithm finds.
    """
    before: dict[str, set[str]] = {}
    for step in in_order(graph):
        before[step] = set(graph[step]).union(*(before[needed] for needed in graph[step]))
    successor: dict[str, str] = {}

    def find_predecessor(step: str, tried: set[str]) -> bool:
        for earlier in before[step] - tried:
            tried.add(earlier)
            if earlier not in successor or find_predecessor(successor[earlier], tried):
                successor[earlier] = step
                return True
        return False

    return len(graph) - sum(find_predecessor(step, set()) for step in graph)
