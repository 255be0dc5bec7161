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

from collections.abc import Callable, Collection, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.formats.checks import compiled, expect, name_of, nothing_left, refusal, take, take_scale, unread
from logitwise.formats.packing import WORD, pack_codes, unpack_codes, words_of
from logitwise.formats.safetensors import SafetensorsFormat
from logitwise.grid import Grid, Quantized

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

WIDER = f"; more words than a dense stream of {WORD}-bit words takes: compressed-tensors before 0.18 wrote such"

# Keys that a config may hold and that say nothing about the values of the weights.
NEUTRAL_KEYS = frozenset({"ignore", "dequantize", "run_compressed", "version", "global_compression_ratio"})
NEUTRAL_WEIGHT_KEYS = frozenset({"observer", "observer_kwargs", "scale_dtype", "zp_dtype"})


class CompressedTensors(SafetensorsFormat):
    """compressed-tensors `pack-quantized`: 2 to 8 bits, groups or channels, symmetric or asymmetric."""

    name = "compressed-tensors"
    suffixes = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")
    scale_suffix, shape_suffix = "weight_scale", "weight_shape"

    def _not_held(self, grid: Grid) -> str | None:
        if not 2 <= grid.bits <= 8:
            return f"{self.name} holds 2 to 8 bits, not {grid.bits}"
        if grid.group_size is not None and grid.group_size < 1:
            return f"a group size of {grid.group_size} is not a number of inputs"
        if grid.scale_dtype not in SCALE_DTYPES:
            return f"{self.name} stores scales as float16, bfloat16 or float32, not {name_of(grid.scale_dtype)}"
        return None

    def _laid_out(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """The three tensors of a symmetric layer, or the four of an asymmetric one."""
        grid = quantized.grid
        stored = {
            f"{prefix}.weight_packed": pack_codes(quantized.codes, grid.bits),
            f"{prefix}.weight_scale": quantized.scale.contiguous(),
            f"{prefix}.weight_shape": torch.tensor(list(quantized.codes.shape)),
        }
        if not grid.symmetric:
            stored[f"{prefix}.weight_zero_point"] = pack_codes(quantized.zero.T, grid.bits).T.contiguous()
        return stored

    def holds_together(self, grids: Collection[Grid]) -> str | None:
        """None, or why layers on these grids cannot share a checkpoint.

        Asymmetric layers are loaded by transformers only with `dequantize`, which takes the first scheme for all.
        """
        dtypes = {name_of(grid.scale_dtype) for grid in grids}
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

    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """One layer, with its zero points written out where the grid is symmetric."""
        out_features, in_features = self.shape_read(prefix, tensors, grid)
        groups = grid.groups(in_features)

        words = (out_features, words_of(in_features, grid.bits))
        packed = take(tensors, f"{prefix}.weight_packed", torch.int32, words, WIDER)
        scale = take_scale(tensors, f"{prefix}.weight_scale", grid.scale_dtype, (out_features, groups))
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

    def shape(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], Tensor], grid: Grid
    ) -> tuple[int, int]:
        """As `weight_shape` says."""
        name = f"{prefix}.weight_shape"
        stored = take({name: load(name)} if name in shapes else {}, name, torch.int64, (2,))
        out_features, in_features = (int(size) for size in stored)
        if out_features < 1 or in_features < 1:
            raise refusal(name, f"it says [{out_features}, {in_features}]")
        return out_features, in_features

    def loaders(self, grids: Collection[Grid], apart: str | None = None) -> str:
        # On a CPU, vLLM 0.32 has a kernel for 4 bits only; what it serves on a GPU is read from its source, not run.
        four = all(grid.bits == 4 for grid in grids)
        served = "and vLLM serves it" if four else "vLLM should serve it on a GPU (not tried)"
        served = f"vLLM does not: {apart}" if apart else served
        return f"transformers with compressed-tensors 0.18 loads it, {served}"

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """The grids of a config with integer weights and no quantized activations.

        Of several schemes a layer has the one that names it, else that whose pattern ("re:...") its name begins with,
        else that of "Linear", as compressed-tensors has it; one scheme alone is that of every quantized layer.
        """
        rest = dict(config)
        expect(rest, "quant_method", "compressed-tensors")
        expect(rest, "format", "pack-quantized")
        expect(rest, "quantization_status", "compressed")
        for key in ("kv_cache_scheme", "sparsity_config", "moe_sparsity_config", "transform_config"):
            expect(rest, key, None, {})
        groups = rest.pop("config_groups", None)
        if not isinstance(groups, Mapping) or not groups:
            raise unread("config_groups", "no groups", "one or more")
        nothing_left(rest, NEUTRAL_KEYS)
        grids = {name: self._grid_of_scheme(scheme, scale_dtype) for name, scheme in groups.items()}
        if len(grids) == 1:
            (only,) = grids.values()
            return lambda module: only
        targets = [(target, grids[name]) for name, scheme in groups.items() for target in _targets(scheme)]

        def grid_of(module: str) -> Grid:
            def rank(target: str) -> int | None:
                if target == module:
                    return 0
                if target.startswith("re:"):
                    return 1 if compiled("targets", target.removeprefix("re:")).match(module) else None
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
            raise unread("weights", "nothing", "a scheme for the weights")
        rest = dict(scheme)
        weights = dict(rest.pop("weights"))
        for key in ("input_activations", "output_activations"):
            expect(rest, key, None)
        expect(rest, "format", None, "pack-quantized")
        nothing_left(rest, frozenset({"targets"}))
        return self._grid_of_weights(weights, scale_dtype)

    def _grid_of_weights(self, weights: dict[str, Any], scale_dtype: torch.dtype) -> Grid:
        expect(weights, "type", "int")
        expect(weights, "dynamic", False)
        expect(weights, "actorder", None, "static", "weight")
        expect(weights, "block_structure", None)
        bits, symmetric = weights.pop("num_bits", None), weights.pop("symmetric", None)
        strategy, group_size = weights.pop("strategy", None), weights.pop("group_size", None)
        nothing_left(weights, NEUTRAL_WEIGHT_KEYS)
        if type(bits) is not int:
            raise unread("num_bits", repr(bits), "a whole number")
        if type(symmetric) is not bool:
            raise unread("symmetric", repr(symmetric), "true or false")
        if strategy not in ("group", "channel"):
            raise unread("strategy", repr(strategy), "'group' or 'channel'")
        if (type(group_size) is not int) if strategy == "group" else (group_size is not None):
            raise unread("group_size", repr(group_size), "a whole number for 'group', null for 'channel'")
        grid = Grid(bits, group_size, symmetric, scale_dtype)
        reason = self.holds(grid)
        if reason is not None:
            raise FormatError("this quantization_config is not read", reason, "check its config_groups")
        return grid


def _targets(scheme: dict[str, Any]) -> list[str]:
    """Which layers a scheme is for."""
    found = scheme.get("targets", [])
    if not isinstance(found, list) or not all(isinstance(target, str) for target in found):
        raise unread("targets", repr(found), "a list of names")
    return found


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
