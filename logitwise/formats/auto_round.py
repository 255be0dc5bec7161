"""AutoRound's own description, `quant_method: auto-round`, of tensors in the layout of GPTQ or AWQ.

`packing_format` says in which:

    auto_round:auto_gptq, auto_round:gptq  as GPTQ v1 without `g_idx`: what AutoRound makes of symmetric grids
    auto_round                             as GPTQ v2 without `g_idx`: of asymmetric ones
    auto_round:gptqmodel                   as GPTQ v2 with `g_idx`
    auto_round:auto_awq, auto_round:awq    as AWQ "gemm"

`bits`, `group_size` and `sym` are those of every layer but the ones that `extra_config` names, by their module or else
by a regular expression that is found anywhere in it, of which the first counts; what it leaves out stays. (A name of
letters and dots is a module: AutoRound writes no pattern without other signs.) There are 2 to 8 bits, 5 to 7 of them
in the same dense stream; scales are float16 and, on symmetric grids, of either sign. A checkpoint is read and refitted,
not written anew. Keys and layouts are those of auto-round 0.16.1 (`export_to_autoround/export.py`,
`inference/convert_model.py`, `auto_round_extension/torch/qlinear_torch.py`).
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from logitwise.formats.awq import Awq
from logitwise.formats.checks import (
    AUTOROUND_KEYS,
    FULL_PRECISION,
    Rule,
    by_layer,
    compiled,
    expect,
    integers_only,
    nothing_left,
    unread,
)
from logitwise.formats.gptq import SETTINGS, V1, V2, Gptq
from logitwise.formats.safetensors import SafetensorsFormat, described
from logitwise.grid import Grid

METHOD = "auto-round"
NEUTRAL_KEYS = AUTOROUND_KEYS | {"packing_format"}
ALL_BITS = (2, 3, 4, 5, 6, 7, 8)
MODULE = re.compile(r"[\w.-]+")


class LikeGptq(Gptq):
    """AutoRound's layers in the layout of GPTQ.

    Args:
        checkpoint_format: how they have their zero points, V1 or V2.
        indexed: whether they have `g_idx`.
    """

    name = METHOD
    bits = ALL_BITS

    def __init__(self, checkpoint_format: str, indexed: bool = False) -> None:
        super().__init__(checkpoint_format)
        self.suffixes = Gptq.suffixes if indexed else ("qweight", "qzeros", "scales")

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        return grids_of(config, lambda settings: described(self, settings, scale_dtype))


class LikeAwq(Awq):
    """AutoRound's layers in the layout of AWQ."""

    name = METHOD

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        return grids_of(config, lambda settings: described(self, settings, scale_dtype))


PACKINGS: dict[str, SafetensorsFormat] = {
    "auto_round": LikeGptq(V2),
    "auto_round:auto_gptq": LikeGptq(V1),
    "auto_round:gptq": LikeGptq(V1),
    "auto_round:gptqmodel": LikeGptq(V2, indexed=True),
    "auto_round:auto_awq": LikeAwq(),
    "auto_round:awq": LikeAwq(),
}


def packed_as(config: Mapping[str, Any]) -> SafetensorsFormat:
    """The layout that a `quantization_config` of AutoRound's speaks of.

    Errors: FormatError, where it is none that is read.
    """
    packing = config.get("packing_format")
    if not isinstance(packing, str) or packing not in PACKINGS:
        raise unread("packing_format", repr(packing), ", ".join(map(repr, PACKINGS)))
    return PACKINGS[packing]


def grids_of(config: Mapping[str, Any], grid_of: Callable[[Mapping[str, Any]], Grid]) -> Callable[[str], Grid]:
    """The grid of each quantized layer, by its module.

    Args:
        config: the `quantization_config`.
        grid_of: the grid that bits, group size and symmetry make.

    Errors: FormatError, naming the key.
    """
    rest = dict(config)
    expect(rest, "quant_method", METHOD)
    integers_only(rest)
    settings = {key: rest.pop(key, None) for key in SETTINGS}
    layers = rest.pop("extra_config", None) or {}
    nothing_left(rest, NEUTRAL_KEYS)
    if not isinstance(layers, Mapping):
        raise unread("extra_config", repr(layers), "a JSON object")
    names = sorted(layers, key=lambda name: MODULE.fullmatch(name) is None)  # modules before patterns, in their order
    return by_layer([_rule(name, layers[name], settings, grid_of) for name in names], grid_of(settings))


def _rule(
    name: str, changes: object, settings: Mapping[str, Any], grid_of: Callable[[Mapping[str, Any]], Grid]
) -> Rule:
    """What `extra_config` says of the layer that has this name, or of those that the pattern is found in."""
    where = f"extra_config: {name}"
    if not isinstance(changes, Mapping):
        raise unread(where, repr(changes), "a JSON object")
    means = name.__eq__ if MODULE.fullmatch(name) else compiled(where, name).search
    rest = {key: value for key, value in changes.items() if value is not None}
    changed = {key: rest.pop(key) for key in SETTINGS if key in rest}
    if changed.get("bits") == FULL_PRECISION:
        return means, None
    integers_only(rest, where)
    nothing_left(rest, frozenset(), where)
    return means, grid_of({**settings, **changed})
