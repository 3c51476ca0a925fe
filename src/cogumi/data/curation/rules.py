"""The rules of stage `filter`, in their order (SPEC A5).

A rule is a module with `Settings`, `judge`, `REMEDY` and, unless a model measures it, `measure`: the statistic of a
row, which `judge` turns into a decision.
"""

from __future__ import annotations

from types import ModuleType

from cogumi.data.curation import boilerplate, coherence, copyright, length, offensive, personal_data

RULES: dict[str, ModuleType] = {
    "length": length,
    "boilerplate": boilerplate,
    "copyright": copyright,
    "offensive": offensive,
    "personal_data": personal_data,
    "coherence": coherence,
}
