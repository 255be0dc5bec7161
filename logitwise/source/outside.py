"""Bounds on a folder from outside, before anything in it is parsed: where links lead, how much is read whole."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from logitwise.errors import SourceError

READ_WHOLE = ("*config.json", "*index.json", "*token*", "vocab*", "merges.txt", "*.model", "chat_template*")
MOST_BYTES = 1 << 26
"""Of a file that is parsed whole; the largest tokenizers take half of it."""

COUNTED = re.compile(r".*layers?|num_labels|first_k_dense_replace|attention_types")
MOST_COUNTED = 10_000
"""transformers makes lists as long as numbers whose key is `COUNTED`, at any depth, when it reads a config."""

CARRIED = ("generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*")
"""What goes with a model wherever it goes."""

BESIDE = (*CARRIED, "*.json", "*.md", "*.html", "*.jinja", "*.txt")
"""What of a folder belongs to the .gguf file in it, which may lie among others."""

HUB_KERNELS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation")


def check_files(folder: Path) -> None:
    """Refuses links that lead out of the folder, and files that are too large to be parsed.

    What a link leads to might be carried over into the checkpoint. The hub's cache is made of links, to `blobs` beside
    its `snapshots`; these are followed.

    Errors: SourceError, naming the file.
    """
    for file in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if _leads_out(file, folder):
            raise SourceError(
                f"{file} is a link out of the model's folder",
                f"it leads to {_target(file)}, which may be anything",
                "put the file itself there, or give the folder that it leads to",
            )
    whole = {file for pattern in READ_WHOLE for file in folder.glob(pattern) if file.suffix != ".safetensors"}
    for file in sorted(file for file in whole if file.is_file()):
        if (size := file.stat().st_size) > MOST_BYTES:
            raise SourceError(
                f"{file} is too large", f"it has {size} bytes; at most {MOST_BYTES} are read", "fetch the model again"
            )


def found(folder: Path, patterns: Iterable[str] = CARRIED) -> list[Path]:
    """The files of a folder that match, but for links that lead out of it."""
    files = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in files if not _leads_out(file, folder))


def _leads_out(file: Path, folder: Path) -> bool:
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return file.is_symlink() and not any(_target(file).is_relative_to(place) for place in homes)


def _target(file: Path) -> Path:
    try:
        return file.resolve()
    except (OSError, RuntimeError):  # links in a circle, which some versions of Python refuse
        return Path(file.anchor)


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Errors: SourceError where it is missing or holds something else.
    """
    if not file.is_file():
        raise SourceError(
            f"{file.parent} has no {file.name}",
            f"a model folder holds {file.name} beside its safetensors files",
            "give the folder that holds it; a .gguf file is given by its own path",
        )
    if (size := file.stat().st_size) > MOST_BYTES:
        raise SourceError(
            f"{file} is too large", f"it has {size} bytes; at most {MOST_BYTES} are read", "fetch it again"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file} is not JSON", str(error), "fetch the file again") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} is not a JSON object", f"it holds a {type(content).__name__}", "fetch it again")
    return content


def check_config(config: dict[str, Any], file: Path) -> None:
    """Refuses what transformers would build without end, fetch and run, or not understand.

    Errors: SourceError, naming the key.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        wants_code = "auto_map" in config
        raise SourceError(
            f"{file.parent} has an architecture that is not supported: {model_type!r}",
            "it comes with its own Python code (auto_map), which logitwise never runs"
            if wants_code
            else "the installed transformers does not know this model_type",
            "use a model whose class is part of transformers" + ("" if wants_code else ", or a newer transformers"),
        )
    if not isinstance(architectures, list | None) or not all(isinstance(name, str) for name in architectures or []):
        raise _not_used(file, "architectures", architectures, "it should be a list of names")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise SourceError(
            f"{file.parent} is not a causal language model",
            f"its config is {model_type}, architecture {', '.join(architectures or ['not named'])}; "
            "transformers has no causal model of that type",
            "give a decoder that predicts the next token (one that AutoModelForCausalLM loads)",
        )
    for key, value in _entries(config):
        if isinstance(value, int | float) and COUNTED.fullmatch(key) and not value <= MOST_COUNTED:
            raise _not_used(file, key, value, f"no model has more than {MOST_COUNTED:,}")
        if key in HUB_KERNELS and "/" in str(value):
            raise _not_used(file, key, value, "it names code on the hub, which logitwise never runs")


def _entries(config: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Every single value at any depth, under the nearest key."""
    left: list[tuple[str, object]] = [*config.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, dict):
            left += value.items()
        elif isinstance(value, list):
            left += [(key, each) for each in value]
        else:
            yield key, value


def check_generation(folder: Path) -> None:
    """Refuses a generation config that cannot be used.

    Errors: SourceError.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    ends = read_json(file).get("eos_token_id")
    if not all(isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends or 0])):
        raise _not_used(file, "eos_token_id", ends, "it should be the number of a token, or a list of them")
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # it may fail in any way inside transformers' constructor
        raise SourceError(
            f"{file} cannot be used", f"{type(error).__name__}: {error}", "correct the file, or fetch it again"
        ) from error


def _not_used(file: Path, key: str, value: object, why: str) -> SourceError:
    return SourceError(
        f"{file} cannot be used: {key} is {str(value)[:80]}", why, "correct the file, or fetch the model again"
    )
