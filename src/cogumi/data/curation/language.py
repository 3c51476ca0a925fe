"""Stage `language`: keeps the rows in given languages and reports the share of each (SPEC A3).

Languages are identified by py3langid, from question and answer. A text that is short, or of which the identification is
not sure (code, numbers), is `unknown`; such rows are kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cogumi.core.errors import DataError
from cogumi.core.packages import load
from cogumi.core.registry import nearest
from cogumi.core.stage import Context
from cogumi.core.types import Artifact
from cogumi.data.curation.pool_writer import PoolWriter, examples_of, rows_of, same_facts, whole_text
from cogumi.data.examples import to_line

VERSION = 1
KIND = "pool"
INPUTS = {"pool": "pool"}
UNKNOWN = "unknown"

_NO_LANGUAGE = "zxx"
"""py3langid's label of a text without words (ISO 639)."""


class Config(BaseModel):
    """`languages` to keep, as two-letter codes. A text of fewer than `shortest` characters, or identified with less
    than `confidence`, is of unknown language, and kept.
    """

    model_config = ConfigDict(extra="forbid")
    languages: tuple[str, ...] = Field(("en",), min_length=1)
    shortest: int = Field(60, ge=0)
    confidence: float = Field(0.5, ge=0, le=1)


estimate = same_facts


def identifier(config: Config) -> Callable[[str], str]:
    """A function from a text to its language; `DataError` for a language that py3langid does not know."""
    langid = load("py3langid.langid", "stage 'language'")
    model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
    for language in config.languages:
        if language not in model.labels:
            raise DataError(f"'{language}' is not a language that can be identified; {nearest(language, model.labels)}")

    def identify(text: str) -> str:
        if len(text) < config.shortest:
            return UNKNOWN
        language, confidence = model.classify(text)
        return UNKNOWN if confidence < config.confidence or language == _NO_LANGUAGE else str(language)

    return identify


def run(config: Config, inputs: Mapping[str, Artifact], out: Path, context: Context) -> dict[str, Any]:
    """`pool` -> the rows in these languages or in an unknown one, and the number of rows of each language."""
    identify, found = identifier(config), Counter[str]()
    remedies = {"language": "add their language to `languages`"}
    with PoolWriter(out, context, rows_of(inputs["pool"]), remedies) as writer:
        for example in examples_of(inputs["pool"]):
            language = identify(whole_text(example))
            found[language] += 1
            if language == UNKNOWN or language in config.languages:
                writer.keep(to_line(example))
            else:
                writer.drop(example, "language", f"its language is '{language}'")
    return writer.metrics() | {"languages": dict(found.most_common())}
