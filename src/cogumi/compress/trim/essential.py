"""The tokens of a byte-level BPE that trimming keeps: frequent ones and essential ones (SPEC A11).

Essential tokens, kept at any frequency:

- bytes, control tokens and all other added tokens;
- white space only: indentation and line ends;
- operators and brackets: one or two ASCII marks, optionally with a space before and line ends after them;
- numbers, because the model would compute differently with a number that is split unlike its neighbours;
- words of programming languages and common libraries that are one token, with or without a space before them;
- the tokens that spell Western European letters, punctuation, currency signs, Greek and mathematical symbols.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from itertools import chain

from cogumi.compress.trim.bpe import BPE
from cogumi.core.errors import DataError
from cogumi.models.tokenization import HFTokenizer

CODE = re.compile(r"[ĠĊĉčċČ]+|Ġ?[!-/:-@\[-`{-~]{1,2}Ċ*|Ġ?[0-9]+")
"""Tokens of white space, of one or two marks, and numbers, in byte-level BPE's spelling: space Ġ, line end Ċ."""

OPERATORS = "=== !== <=> **= //= >>= <<= >>> &&= ||= ??= ... ..= ''' \"\"\" ``` /** -->"
WORDS = """
and any args array as assert async await auto bool boolean break byte case cast catch char class cls cmp const continue
data debug decltype def default del delete dict do double dtype dtypes elif else elsif end endif enum enumerate error
eval except Exception exec exit export extends extern False false filter final finally float fn for foreach format from
func function get global goto Header id if impl implements import in include index init input insert instanceof int
interface is isinstance iter join json key kwargs lambda len let list long loop main map match math max message min mod
module move mut namespace new nil None not np null nullptr num numpy object open operator or os output override package
pandas parse pass path pd print printf println private property protected pub public raise range re read register
request response result return reversed round self set short size sizeof sort sorted split static std str string String
struct sub sum super switch sync synchronized sys template test then this throw throws time torch trait True true try
tuple type typedef typename typeof undefined union unsafe unsigned use using val value ValueError var vector virtual
void volatile when where while with write yield zip __init__ __name__ __main__ #include #define
SELECT FROM WHERE JOIN LEFT INNER ON GROUP ORDER BY HAVING INSERT INTO VALUES UPDATE SET DELETE CREATE TABLE ALTER DROP
INDEX VIEW AS AND OR NOT NULL IN LIKE LIMIT DISTINCT COUNT SUM AVG MIN MAX PRIMARY KEY INT VARCHAR
div span href src img html head body script style link http https www com rel
"""
SYMBOLS = (
    (0x20, 0x7E),
    (0xA1, 0xFF),  # Latin-1
    (0x370, 0x3FF),  # Greek
    (0x2010, 0x205E),  # dashes, quotation marks, dots
    (0x2070, 0x209C),  # superscripts and subscripts
    (0x20A0, 0x20BF),  # currency
    (0x2100, 0x218B),  # letterlike symbols, fractions, Roman numerals
    (0x2190, 0x22FF),  # arrows, mathematical operators
    (0x2300, 0x230B),  # ceilings and floors
    (0x27C0, 0x27EF),  # further mathematical symbols and brackets
    (0x2A00, 0x2AFF),
)
"""First and last code point of each range of characters whose tokens are kept."""


def essential(tokenizer: HFTokenizer, bpe: BPE, always: Iterable[int]) -> set[str]:
    """The essential tokens, without their merge parents; `always` are further ids to include."""
    vocab = tokenizer.raw.get_vocab(with_added_tokens=False)
    names = {i: token for token, i in bpe.ids.items()}
    found = {token for token in vocab if len(token) == 1}
    found |= {names[i] for i in chain(tokenizer.raw.get_added_tokens_decoder(), always)}
    found |= {token for token in vocab if CODE.fullmatch(token)}
    symbols = [chr(point) for first, last in SYMBOLS for point in range(first, last + 1)]
    for text in chain.from_iterable((one, f" {one}") for one in symbols):
        found.update(names[i] for i in tokenizer.encode(text))
    for text in chain.from_iterable((one, f" {one}") for one in f"{OPERATORS} {WORDS}".split()):
        ids = tokenizer.encode(text)
        found.update(names[i] for i in ids[: len(ids) == 1])
    return found


def cover(counts: Mapping[int, int], share: float) -> list[int]:
    """The fewest ids that make up a share of all counts, most frequent first."""
    order = sorted(counts, key=lambda i: (-counts[i], i))
    wanted = share * sum(counts.values())
    taken = 0
    for number, i in enumerate(order):
        if taken >= wanted:
            return order[:number]
        taken += counts[i]
    return order


def covering(bpe: BPE, counts: Mapping[int, int], share: float, essentials: Collection[str]) -> set[str]:
    """The essential tokens, the fewest tokens that cover a share of all counts, and all their merge parents."""
    names = {i: token for token, i in bpe.ids.items()}
    return bpe.closed([*essentials, *(names[i] for i in cover(counts, share))])


def of_size(bpe: BPE, counts: Mapping[int, int], size: int, essentials: Collection[str]) -> set[str]:
    """`size` tokens: the essential ones, then the most frequent ones with their merge parents.

    Tokens that never occur come last, in the order of ids, which follows their frequency in the BPE's training data.
    `DataError` if the essential tokens alone exceed `size`.
    """
    kept = bpe.closed(essentials)
    if size < len(kept):
        raise DataError(f"size: {size} is too small: {len(kept)} tokens are always kept (bytes, code, symbols)")
    order = sorted(bpe.ids, key=lambda token: (-counts.get(bpe.ids[token], 0), bpe.ids[token]))
    for token in order:
        if len(kept) == size:
            break
        if token not in kept and len(new := bpe.missing(token, kept)) <= size - len(kept):
            kept |= new
    return kept
