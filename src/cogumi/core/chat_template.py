"""Renders chat messages through a model's own template, for training and serving alike.

Message contents never reach the template: it is rendered around placeholders, and the contents are put back as
separate pieces that are tokenized without special tokens. So a user cannot inject a control token into a prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from jinja2 import Template, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cogumi.core.errors import RequestError
from cogumi.core.types import Message

_MARK = re.compile("\ue000(\\d+)\ue001")  # private-use characters: no template contains them


@lru_cache(maxsize=16)
def _compile(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def reject(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = reject
    return environment.from_string(source)


def render_pieces(
    template: str, messages: Sequence[Message], *, add_generation_prompt: bool = True, bos: str = "", eos: str = ""
) -> list[tuple[str, bool]]:
    """Split a rendered chat into `(text, is_template)` pieces, in order.

    Raises `RequestError` if the template rejects the messages (for example because of an unknown role).
    """
    marked = [{"role": m.role, "content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
    try:
        text = _compile(template).render(
            messages=marked, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
        )
    except TemplateError as error:
        raise RequestError(f"the model's chat template rejects these messages: {error}") from error
    pieces: list[tuple[str, bool]] = []
    for i, part in enumerate(_MARK.split(text)):
        if i % 2:
            pieces.append((messages[int(part)].content, False))
        elif part:
            pieces.append((part, True))
    return pieces
