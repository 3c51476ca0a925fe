"""`core.stage`: the declarations of every stage, and the error for a stage that lacks one."""

import re
import sys
import types
from pathlib import Path

import pytest
from pydantic import BaseModel

from cogumi.core import registry
from cogumi.core.errors import RecipeError
from cogumi.core.stage import DECLARED, matches, optional_inputs

STAGES = sorted(registry.STAGES)
READ = re.compile(r"""inputs(?:\.get\(|\[)["'](\w+)["']|["'](\w+)["'] in inputs""")
"""How a stage's `run` names an input."""


def declared(name):
    module = registry.stage(name)
    return {**module.INPUTS, **optional_inputs(module)}


@pytest.mark.parametrize("name", STAGES)
def test_every_input_a_stage_reads_is_declared(name):
    source = Path(registry.stage(name).__file__).read_text("utf-8")
    read = {role for found in READ.findall(source) for role in found if role}
    assert not {role for role in read if not any(matches(role, one) for one in declared(name))}


@pytest.mark.parametrize("name", STAGES)
def test_every_input_kind_is_made_by_a_stage(name):
    made = {registry.stage(other).KIND for other in STAGES}
    assert {kind for kinds in declared(name).values() for kind in kinds.split("|")} <= made


@pytest.mark.parametrize("missing", DECLARED)
def test_stage_without_a_declaration_is_refused_in_one_line(monkeypatch, missing):
    module = types.ModuleType("half_a_stage")
    complete = {"VERSION": 1, "KIND": "x", "INPUTS": {}, "Config": BaseModel, "run": lambda *_: {}}
    vars(module).update({name: value for name, value in complete.items() if name != missing})
    monkeypatch.setitem(sys.modules, "half_a_stage", module)
    monkeypatch.setitem(registry.STAGES, "half", "half_a_stage")
    with pytest.raises(RecipeError) as caught:
        registry.stage("half")
    assert str(caught.value) == (
        f"stage 'half': its module half_a_stage does not declare {missing}; CONTRIBUTING.md says what a stage declares"
    )


def test_role_with_a_star_matches_roles_with_that_prefix():
    assert matches("modifier_math", "modifier_*")
    assert not matches("modifier_", "modifier_*")
    assert not matches("modifier", "modifier_*")
    assert matches("model", "model")
    assert not matches("models", "model")
