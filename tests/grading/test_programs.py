"""Programs in the forms in which chat models write them."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cogumi.core.types import Example, Message
from cogumi.grading.graders import grade_all
from cogumi.grading.programs import MOST, programs
from support.public_data import public_data

CODE = "import math\n\ndef f(x):\n    return math.floor(x) + 1"
FORMS = {
    "plain": "{code}",
    "fence": "Here it is:\n\n```python\n{code}\n```\nThis works.",
    "commands before": "Install nothing:\n```bash\npip install x\n```\n\n```python\n{code}\n```",
    "example after": "```python\n{code}\n```\nExample:\n```python\nprint(1)\n```",
    "draft before": "First:\n```python\ndef nothing():\n    pass\n```\nBetter:\n```python\n{code}\n```",
    "plan before": "```text\n1. loop\n2. return\n```\n```python\n{code}\n```",
    "attribute": '```python title="solution.py"\n{code}\n```\nDone.',
    "Python 3": "```Python 3\n{code}\n```",
    "space before the language": "``` python\n{code}\n```",
    "tildes": "~~~python\n{code}\n~~~",
    "four ticks": "````python\n{code}\n````",
    "no end": "```python\n{code}",
    "end on the last line": "```python\n{code}```",
    "tags": "[BEGIN]\n{code}\n[DONE]",
    "prose before": "Here is the function:\n\n{code}",
    "prose after": "{code}\n\nThis function works, doesn't it?",
    "thoughts": "<think>use\n```python\nx = 1\n```\n</think>\n```python\n{code}\n```",
    "part for scripts": "{code}\n\nif __name__ == '__main__':\n    print(f(int(input())))",
    "unit tests": "import unittest\n{code}\n\nif __name__ == '__main__':\n    unittest.main()",
    "byte order mark": "\ufeff{code}",
}


def example(tests):
    return Example("id", "code", 0, (Message("user", "q"),), "", meta={"check": {"kind": "code", "tests": tests}})


def test_programs_are_found_in_every_form():
    question = example(["assert f(1.5) == 2", "assert f(-1) == 0"])
    outputs = {name: form.format(code=CODE) for name, form in FORMS.items()}
    indented = "\n".join(f"   {line}" for line in CODE.split("\n"))
    outputs["in a list"] = f"1. Code:\n   ```python\n{indented}\n   ```\n"
    body = CODE.removeprefix("import math\n")
    outputs["two fences"] = f"```python\nimport math\n```\nthen\n```python\n{body}\n```"
    outputs["Windows lines"] = f"```python\n{CODE}\n```".replace("\n", "\r\n")
    verdicts = grade_all([(question, output) for output in outputs.values()])
    assert {name: v.reason for name, v in zip(outputs, verdicts, strict=True) if not v.correct} == {}
    wrong = grade_all([(question, output.replace("+ 1", "+ 2")) for output in outputs.values()])
    assert not any(verdict.correct for verdict in wrong)


def test_an_output_without_a_program_fails_with_the_first_error():
    (verdict,) = grade_all([(example(["assert f(1) == 2"]), "I cannot do that.")])
    assert not verdict.correct
    assert "SyntaxError" in verdict.reason
    assert programs("") == [""]


PIECES = st.sampled_from(["```", "~~~", "\n", "python", "x = 1", "def f(", " ", "[BEGIN]"])


@given(st.text() | st.lists(PIECES).map("".join))
def test_any_text_is_accepted(text):
    assert 1 <= len(programs(text)) <= MOST


def test_reference_programs_of_a_public_set_pass():
    rows = json.loads(public_data("mbpp/sanitized-mbpp.json").read_text())
    rows = [row for row in rows if row["task_id"] != 123]  # needs more than the second of CPU time that a program has
    pairs = [(example([*row["test_imports"], *row["test_list"]]), f"```python\n{row['code']}\n```") for row in rows]
    assert [row["task_id"] for row, v in zip(rows, grade_all(pairs), strict=True) if not v.correct] == []
