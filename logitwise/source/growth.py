"""How much longer a tokenizer may make a text: bounded before it is loaded, since loading uses it."""

import base64
from math import prod
from pathlib import Path
from typing import Any

from logitwise.errors import SourceError
from logitwise.source.outside import read_json

MOST_GROWTH = 1000
"""How many characters may become of one; a well-known tokenizer makes some 60."""


def check_growth(file: Path) -> None:
    """Refuses a tokenizer.json whose steps, one after another, would turn a short text into one that fills the memory.

    Errors: SourceError, naming the file. KeyError, TypeError or ValueError where a step is not as it should be.
    """
    content = read_json(file)
    before, split, after = (
        1.0 if content.get(part) is None else growth(content[part])
        for part in ("normalizer", "pre_tokenizer", "decoder")
    )
    if (found := max(before * split, after)) > MOST_GROWTH:
        raise SourceError(
            f"{file} blows a text up",
            f"its steps may make {found:.3g} characters of one; at most {MOST_GROWTH} are let through",
            "do not use this model before you know who made its tokenizer",
        )


def growth(step: dict[str, Any]) -> float:
    """The most characters that one step of a tokenizer makes of one."""
    match step["type"]:
        case "Sequence":
            (parts,) = (value for value in step.values() if isinstance(value, list))
            return prod(growth(part) for part in parts)
        case "Replace":
            # An expression may match between two characters, a string takes the place of one at least.
            return float(len(step["content"]) + ("Regex" in step["pattern"]) or 1)
        case "Prepend":
            return 1.0 + len(step["prepend"])
        case "ByteLevel":
            return 4.0
        case "Precompiled":
            charsmap = base64.b64decode(step["precompiled_charsmap"])
            # The size of a search tree, the tree, and what it leads to, each ended by a zero.
            texts = charsmap[4 + int.from_bytes(charsmap[:4], "little") :].split(b"\0")
            return float(max(map(len, texts)) or 1)
    return 1.0
