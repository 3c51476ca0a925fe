"""docs/requirements.md lists exactly the cited requirements; code cites ids only in module docstrings."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

import cogumi

SOURCE = Path(cogumi.__file__).parent
ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "requirements.md"
DOCUMENTS = [path for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")) if path != PAGE]
MODULES = sorted(SOURCE.rglob("*.py"))

ID = r"[A-HM]\d{1,2}b?"
CITED = re.compile(rf"\(SPEC ({ID}(?:, {ID})*)(?=[;)])")
"""In a module's docstring; what follows a semicolon is another source."""
CITED_IN_DOCUMENT = re.compile(rf"\(({ID}(?:, {ID})*)(?=[;)])")
ROW = re.compile(rf"^\| ({ID}) \| .+ \| (.+) \|$", re.MULTILINE)
HOMONYMS = {"F1", "F16"}
"""Ids that are also the name of a metric and of a number type, so that their use cannot be checked."""


def cited(text, form=CITED):
    return {id for run in form.findall(text) for id in run.split(", ")}


def page():
    return dict(ROW.findall(PAGE.read_text("utf-8")))


def docstring_of(path):
    return ast.get_docstring(ast.parse(path.read_text("utf-8")), clean=False) or ""


def prose_of(text):
    """Comments and docstrings of a module, without its own docstring."""
    tree = ast.parse(text)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    parts = [token.string for token in tokens if token.type == tokenize.COMMENT]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            parts.append(ast.get_docstring(node) or "")
    return "\n".join(parts)


def test_page_lists_exactly_the_cited_requirements():
    found = {id for path in MODULES for id in cited(docstring_of(path))}
    found |= {id for path in DOCUMENTS for id in cited(path.read_text("utf-8"), CITED_IN_DOCUMENT)}
    assert found - page().keys() == set(), "cited, but not on the page"
    assert page().keys() - found == set(), "on the page, but never cited"


def test_files_named_on_the_page_exist():
    for id, where in page().items():
        names = re.findall(r"`([^`]+)`", where)
        assert names, f"{id}: no place"
        assert not [name for name in names if not (SOURCE / name).exists()], id


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_ids_are_cited_only_in_module_docstrings_in_one_form(path):
    text = path.read_text("utf-8")
    docstring = docstring_of(path)
    elsewhere = text.replace(docstring, "", 1) if docstring else text
    assert not re.search(r"\bSPEC\b", elsewhere), "cite requirements in the module's docstring only"
    loose = set(re.findall(rf"\b{ID}\b", CITED.sub("", docstring) + prose_of(text))) & page().keys()
    assert not loose - HOMONYMS
    assert not re.search(r"\bSPEC\b", CITED.sub("", docstring)), "write (SPEC F1, F2)"
