"""The `pack-quantized` format of compressed-tensors, which transformers and vLLM load.

For a Linear module P of shape [out, in], in place of P.weight:

    P.weight_packed      int32 [out, ceil(in * bits / 32)]      codes, packed along the inputs
    P.weight_scale       float [out, groups]
    P.weight_shape       int64 [2]                              out, in
    P.weight_zero_point  int32 [ceil(out * bits / 32), groups]  asymmetric only; packed along the OUTPUTS

Codes and zero points are stored unsigned. The stream is the dense one (`packing.py`), as compressed-tensors 0.18 and
later and vLLM read it; up to 0.17.1 that package left bits unused in each word at 3, 5, 6 and 7 bits. Files carry no
version, so the reader tells the two apart by the number of words and refuses the older.
"""

import re
from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.formats.base import Format
from logitwise.formats.checks import check_on_grid, refusal, take, type_name, unread
from logitwise.formats.packing import WORD, pack_codes, unpack_codes, words_of
from logitwise.grid import Grid, Quantized

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

# Keys that a config may hold and that say nothing about the values of the weights.
NEUTRAL_KEYS = frozenset({"ignore", "dequantize", "run_compressed", "version", "global_compression_ratio"})
NEUTRAL_WEIGHT_KEYS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})


class CompressedTensors(Format):
    """compressed-tensors `pack-quantized`: 2 to 8 bits, groups or channels, symmetric or asymmetric."""

    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    scale_suffix = "weight_scale"

    def holds(self, grid: Grid) -> str | None:
        """None, or why the grid cannot be written."""
        if not 2 <= grid.bits <= 8:
            return f"{self.name} holds 2 to 8 bits, not {grid.bits}"
        if grid.group_size is not None and grid.group_size < 1:
            return f"a group size of {grid.group_size} is not a number of inputs"
        if grid.scale_dtype not in SCALE_DTYPES:
            return f"{self.name} stores scales as float16, bfloat16 or float32, not {type_name(grid.scale_dtype)}"
        return None

    def tensors(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """The three tensors of a symmetric layer, or the four of an asymmetric one."""
        grid, (out_features, in_features) = quantized.grid, quantized.codes.shape
        reason = self.holds(grid) or self.holds_layer(prefix, out_features, in_features, False, grid)
        if reason is not None:
            raise FormatError(f"{prefix} cannot be written", reason, "choose another grid or format")
        check_on_grid(prefix, quantized)
        stored = {
            f"{prefix}.weight_packed": pack_codes(quantized.codes, grid.bits),
            f"{prefix}.weight_scale": quantized.scale.contiguous(),
            f"{prefix}.weight_shape": torch.tensor([out_features, in_features]),
        }
        if not grid.symmetric:
            stored[f"{prefix}.weight_zero_point"] = pack_codes(quantized.zero.T, grid.bits).T.contiguous()
        return stored

    def holds_together(self, grids: Collection[Grid]) -> str | None:
        """None, or why layers on these grids cannot share a checkpoint.

        Asymmetric layers are loaded by transformers only with `dequantize`, which takes the first scheme for all.
        """
        dtypes = {type_name(grid.scale_dtype) for grid in grids}
        if len(dtypes) > 1:
            return f"{self.name} has one scale type for all layers, not {' and '.join(sorted(dtypes))}"
        if len(grids) > 1 and not all(grid.symmetric for grid in grids):
            return "transformers loads layers on several grids only where all are symmetric"
        return None

    def quantization_config(self, grids: Mapping[str, Grid], ignored: list[str]) -> dict[str, Any]:
        """One scheme for every Linear module but the ignored ones, or one for each grid, which names its modules.

        An asymmetric config asks transformers to dequantize while loading: with compressed-tensors 0.18 to 0.20 its
        default way expects zero points of another shape than the package itself writes, and fails. vLLM ignores the
        key.
        """
        found = sorted(set(grids.values()), key=str)
        groups = {}
        for index, grid in enumerate(found):
            targets = ["Linear"] if len(found) == 1 else [module for module in grids if grids[module] == grid]
            groups[f"group_{index}"] = _scheme(grid, targets)
        config = {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": ignored,
        }
        return config if all(grid.symmetric for grid in found) else config | {"dequantize": True}

    def shape(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], grid: Grid, read: Callable[[str], Tensor]
    ) -> tuple[int, ...]:
        """What the layer's `weight_shape` says."""
        stored = f"{prefix}.weight_shape"
        if stored not in shapes:
            raise FormatError(f"tensor {stored} is missing", f"{prefix} is quantized", "fetch the model again")
        return tuple(int(size) for size in read(stored).flatten())

    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """One layer, with its zero points written out where the grid is symmetric."""
        shape = take(tensors, f"{prefix}.weight_shape", torch.int64, (2,))
        out_features, in_features = (int(size) for size in shape)
        if out_features < 1 or in_features < 1:
            raise refusal(f"{prefix}.weight_shape", f"it says [{out_features}, {in_features}]")
        reason = self.holds_layer(prefix, out_features, in_features, False, grid)
        if reason is not None:
            raise refusal(f"{prefix}.weight_shape", reason)
        groups = grid.groups(in_features)

        words = (out_features, words_of(in_features, grid.bits))
        packed = _take_packed(tensors, f"{prefix}.weight_packed", words)
        scale = take(tensors, f"{prefix}.weight_scale", grid.scale_dtype, (out_features, groups))
        if not bool(torch.isfinite(scale).all()):
            raise refusal(f"{prefix}.weight_scale", "it holds NaN or infinity")
        for suffix in ("weight_g_idx", "weight_zero_point"):
            if f"{prefix}.{suffix}" in tensors and (grid.symmetric or suffix == "weight_g_idx"):
                raise refusal(f"{prefix}.{suffix}", "its config describes a layer that has no such tensor")
        if grid.symmetric:
            zero = torch.full((out_features, groups), grid.middle, dtype=torch.uint8)
        else:
            words = (words_of(out_features, grid.bits), groups)
            stored = take(tensors, f"{prefix}.weight_zero_point", torch.int32, words)
            zero = unpack_codes(stored.T, grid.bits, out_features).T.contiguous()
        return Quantized(unpack_codes(packed, grid.bits, in_features), scale, zero, grid)

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """The grids of a config with integer weights and no quantized activations.

        Of several schemes a layer has the one that names it, else that whose pattern ("re:...") its name begins with,
        else that of "Linear", as compressed-tensors has it; one scheme alone is that of every quantized layer.
        """
        rest = dict(config)
        _expect(rest, "quant_method", "compressed-tensors")
        _expect(rest, "format", "pack-quantized")
        _expect(rest, "quantization_status", "compressed")
        for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
            _expect(rest, key, None, {})
        groups = rest.pop("config_groups", None)
        if not isinstance(groups, Mapping) or not groups:
            raise _unread("config_groups", "no groups", "one or more")
        _nothing_left(rest, NEUTRAL_KEYS)
        grids = {name: self._grid_of_scheme(scheme, scale_dtype) for name, scheme in groups.items()}
        if len(grids) == 1:
            (only,) = grids.values()
            return lambda module: only
        targets = [(target, grids[name]) for name, scheme in groups.items() for target in scheme.get("targets", ())]

        def grid_of(module: str) -> Grid:
            def rank(target: str) -> int | None:
                if target == module:
                    return 0
                if target.startswith("re:"):
                    return 1 if re.match(target.removeprefix("re:"), module) else None
                return 2 if target == "Linear" else None

            found = [(place, grid) for target, grid in targets if (place := rank(target)) is not None]
            if not found:
                raise FormatError(
                    f"{module} has no scheme", "no group of quantization_config names it", "give another checkpoint"
                )
            return min(found, key=itemgetter(0))[1]

        return grid_of

    def _grid_of_scheme(self, scheme: object, scale_dtype: torch.dtype) -> Grid:
        if not isinstance(scheme, Mapping) or not isinstance(scheme.get("weights"), Mapping):
            raise _unread("weights", "nothing", "a scheme for the weights")
        rest = dict(scheme)
        weights = dict(rest.pop("weights"))
        for key in ("input_activations", "output_activations"):
            _expect(rest, key, None)
        _expect(rest, "format", None, "pack-quantized")
        _nothing_left(rest, frozenset({"targets"}))
        return self._grid_of_weights(weights, scale_dtype)

    def _grid_of_weights(self, weights: dict[str, Any], scale_dtype: torch.dtype) -> Grid:
        _expect(weights, "type", "int")
        _expect(weights, "dynamic", False)
        _expect(weights, "actorder", None, "static", "weight")
        _expect(weights, "block_structure", None)
        bits, symmetric = weights.pop("num_bits", None), weights.pop("symmetric", None)
        strategy, group_size = weights.pop("strategy", None), weights.pop("group_size", None)
        _nothing_left(weights, NEUTRAL_WEIGHT_KEYS)
        if type(bits) is not int:
            raise _unread("num_bits", repr(bits), "a whole number")
        if type(symmetric) is not bool:
            raise _unread("symmetric", repr(symmetric), "true or false")
        if strategy not in ("group", "channel"):
            raise _unread("strategy", repr(strategy), "'group' or 'channel'")
        if (type(group_size) is not int) if strategy == "group" else (group_size is not None):
            raise _unread("group_size", repr(group_size), "a whole number for 'group', null for 'channel'")
        grid = Grid(bits, group_size, symmetric, scale_dtype)
        reason = self.holds(grid)
        if reason is not None:
            raise FormatError("this quantization_config is not read", reason, "check its config_groups")
        return grid


def _scheme(grid: Grid, targets: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": "channel" if grid.group_size is None else "group",
        "group_size": grid.group_size,
        "dynamic": False,
    }
    return {"targets": targets, "weights": weights, "input_activations": None, "output_activations": None}


def _take_packed(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, int]) -> Tensor:
    """The codes of a layer; of too many words it is said who wrote such."""
    found = tensors.get(name)
    if found is not None and found.dim() == 2 and found.shape[1] > shape[1]:
        why = f"more words than a dense stream of {WORD}-bit words takes: compressed-tensors before 0.18 wrote such"
        return take(tensors, name, torch.int32, shape, why)
    return take(tensors, name, torch.int32, shape)


def _unread(key: str, found: str, expected: str) -> FormatError:
    return unread("quantization_config", key, found, expected)


def _expect(config: dict[str, Any], key: str, *allowed: object) -> None:
    """Takes a key out of the config; only some values are read, and a missing key counts as null."""
    value = config.pop(key, None)
    if value not in allowed:
        raise _unread(key, repr(value), " or ".join(repr(one) for one in allowed))


def _nothing_left(config: dict[str, Any], neutral: frozenset[str]) -> None:
    unknown = sorted(set(config) - neutral)
    if unknown:
        raise _unread(unknown[0], repr(config[unknown[0]]), "checkpoints without this key")
