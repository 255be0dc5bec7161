"""What strict formats share: tensors and config keys that are not exactly as expected are refused by name."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.grid import Grid, Quantized

Rule = tuple[Callable[[str], object], Grid | None]
"""Whether a layer is meant, by its module; and the grid of such layers, None where they are in full precision."""

FULL_PRECISION = 16
"""The bits that AutoRound names for what is not quantized."""

AUTOROUND_KEYS = frozenset(
    {
        "amp",
        "autoround_version",
        "batch_size",
        "block_name_to_quantize",
        "dataset",
        "enable_minmax_tuning",
        "enable_norm_bias_tuning",
        "enable_quanted_input",
        "gradient_accumulate_steps",
        "iters",
        "low_gpu_mem_usage",
        "lr",
        "minmax_lr",
        "nsamples",
        "provider",
        "quant_block_list",
        "scale_dtype",
        "seqlen",
        "to_quant_block_names",
    }
)
"""What AutoRound tells of its tuning in the config of whatever format: nothing about the values of the weights."""


def name_of(dtype: torch.dtype) -> str:
    """A type as people write it."""
    return str(dtype).removeprefix("torch.")


def check_on_grid(prefix: str, quantized: Quantized) -> None:
    """Refuses what the packed form could not give back: a value beyond the bits, a zero point that is not stored."""
    grid = quantized.grid
    remedy = "quantize this layer again; if that does not help, report it as a bug"
    groups = (quantized.codes.shape[0], grid.groups(quantized.codes.shape[1]))
    stored = [("scale", quantized.scale, grid.scale_dtype), ("zero", quantized.zero, torch.uint8)]
    if grid.minimum != (quantized.minimum is not None):
        raise FormatError(
            f"{prefix}: minima are {'missing' if grid.minimum else 'there'}", f"its grid is {grid}", remedy
        )
    if quantized.minimum is not None:
        stored.append(("minimum", quantized.minimum, grid.scale_dtype))
    for what, tensor, dtype in stored:
        if tuple(tensor.shape) != groups or tensor.dtype != dtype:
            found = f"{name_of(tensor.dtype)} {list(tensor.shape)}"
            why = f"its grid asks for {name_of(dtype)} {list(groups)}"
            raise FormatError(f"{prefix}: {what} is {found}", why, remedy)
    for what, tensor in (("code", quantized.codes), ("zero point", quantized.zero)):
        if int(tensor.max()) > grid.levels:
            why = f"{grid.bits} bits hold 0 to {grid.levels}"
            raise FormatError(f"{prefix}: {what} {int(tensor.max())} is out of range", why, remedy)
    if grid.symmetric and not bool((quantized.zero == grid.middle).all()):
        why = f"on a symmetric grid all must be {grid.middle}"
        raise FormatError(f"{prefix}: zero points differ from {grid.middle}", why, remedy)


def refusal(name: str, why: str) -> FormatError:
    """What is raised for a tensor of a file."""
    return FormatError(f"tensor {name} is refused", why, "check that the checkpoint is complete and its config its own")


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...], wider: str = ""
) -> Tensor:
    """The tensor of this name, type and shape.

    Args:
        tensors: by name.
        name: the one that is asked for.
        dtype: its type.
        shape: its shape.
        wider: what is added to the refusal of a matrix that has more columns.

    Errors: FormatError where it is missing or another.
    """
    if name not in tensors:
        raise refusal(name, "it is missing")
    tensor = tensors[name]
    if tensor.dtype == dtype and tuple(tensor.shape) == shape:
        return tensor
    why = f"expected {name_of(dtype)} {list(shape)}, found {name_of(tensor.dtype)} {list(tensor.shape)}"
    if tensor.dim() == 2 and tensor.shape[1] > shape[1]:
        why += wider
    raise refusal(name, why)


def take_scale(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """As `take`; NaN and infinity are refused too."""
    scale = take(tensors, name, dtype, shape)
    if not bool(torch.isfinite(scale).all()):
        raise refusal(name, "it holds NaN or infinity")
    return scale


def take_nothing_else(tensors: Mapping[str, Tensor], prefix: str, suffixes: Collection[str]) -> None:
    """Refuses the tensors of a layer that its format has no use for."""
    for name in tensors:
        if name not in {f"{prefix}.{suffix}" for suffix in suffixes}:
            raise refusal(name, f"a layer has {', '.join(suffixes)} and no other tensor")


def unread(key: str, found: str, expected: str, where: str = "quantization_config") -> FormatError:
    """What is raised for a key of a table of config.json."""
    why = f"it says {found}; logitwise reads {expected}"
    return FormatError(f"{where}: {key} is not read", why, "give another checkpoint")


def expect(config: dict[str, Any], key: str, *allowed: object, where: str = "quantization_config") -> None:
    """Takes a key out of the config; only some values are read, and a missing key counts as null."""
    value = config.pop(key, None)
    if value not in allowed:
        raise unread(key, repr(value), " or ".join(repr(one) for one in allowed), where)


def integers_only(config: dict[str, Any], where: str = "quantization_config") -> None:
    """Takes AutoRound's keys that say that weights are integers, and nothing else is quantized, rescaled or rotated."""
    for key in [key for key in config if key.startswith("act_") or key in ("super_bits", "super_group_size")]:
        expect(config, key, None, *([FULL_PRECISION] if key == "act_bits" else []), where=where)
    expect(config, "data_type", None, "int", where=where)
    expect(config, "rotation_config", None, where=where)


def whole(config: dict[str, Any], key: str, expected: str = "a whole number") -> int:
    """Takes a whole number out of the config."""
    value = config.pop(key, None)
    if type(value) is not int:
        raise unread(key, repr(value), expected)
    return value


def nothing_left(config: dict[str, Any], neutral: frozenset[str], where: str = "quantization_config") -> None:
    """Refuses a config with keys that nobody took, other than those that say nothing about the weights."""
    unknown = sorted(set(config) - neutral)
    if unknown:
        raise unread(unknown[0], repr(config[unknown[0]]), "checkpoints without this key", where)


def by_layer(rules: Sequence[Rule], every: Grid) -> Callable[[str], Grid]:
    """The grid of each quantized layer by its module: that of the first rule that means it, else `every`.

    What is returned raises FormatError for a layer whose rule says that it is in full precision.
    """

    def grid_of(module: str) -> Grid:
        grid = next((grid for means, grid in rules if means(module)), every)
        if grid is None:
            why = "config.json says that it is in full precision, and it has the tensors of a quantized layer"
            raise FormatError(f"{module} has no grid", why, "give another checkpoint")
        return grid

    return grid_of


def compiled(key: str, pattern: str) -> re.Pattern[str]:
    """A regular expression of the config.

    Errors: FormatError, naming its key.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise unread(key, f"{pattern!r}, no regular expression: {error}", "one that is") from error
