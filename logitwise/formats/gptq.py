"""The GPTQ layout of AutoGPTQ and gptqmodel, which transformers loads with gptqmodel, and vLLM where it is 4 bits.

For a Linear module P of shape [out, in], in place of P.weight:

    P.qweight  int32   [in * bits / 32, out]      codes, packed along the INPUTS, down each column
    P.qzeros   int32   [groups, out * bits / 32]  zero points, packed along the outputs
    P.scales   float16 [groups, out]
    P.g_idx    int32   [in]                       the group of each input, in their natural order

The stream is the dense one (`packing.py`) at every number of bits. Zero points are there on symmetric grids too. How
they are stored is told by `checkpoint_format` alone: "gptq" (v1, also where the key is missing) has z - 1, "gptq_v2"
has z. A wrong label is loaded by engines without a word, and the weights are wrong. Symmetric grids are written as v1,
which most readers know, asymmetric ones as v2, since v1 has no place for z = 0: readers disagree on whether a stored
2^bits - 1 is 0 or 2^bits. gptqmodel takes 1 from every zero point of a word at once, so that a 0 borrows from the next
one, and undoes that by the same sum (`convert_gptq_v2_to_v1_format_module`); files that name it are read its way.

gptqmodel's `dynamic` gives some layers other settings: by the first pattern that a layer's name begins with, "-:..."
for full precision, "+:..." or without a sign for what is different.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from logitwise.formats.checks import (
    AUTOROUND_KEYS,
    Rule,
    by_layer,
    compiled,
    expect,
    integers_only,
    name_of,
    nothing_left,
    refusal,
    take,
    take_nothing_else,
    take_scale,
    unread,
)
from logitwise.formats.packing import WORD, pack_codes, unpack_codes
from logitwise.formats.safetensors import SafetensorsFormat, described
from logitwise.grid import Grid, Quantized

V1, V2 = "gptq", "gptq_v2"
BITS = (2, 3, 4, 8)
SETTINGS = ("bits", "group_size", "sym")
"""The keys that make a grid, of all layers and of those that `dynamic` names."""
DYNAMIC_NEUTRAL = frozenset({"act_group_aware", "damp_auto_increment", "damp_percent", "desc_act", "mse"})

# Keys that a config may hold and that say nothing about the values of the weights.
NEUTRAL_KEYS = frozenset(
    {
        "batch_size",
        "block_name_to_quantize",
        "cache_block_outputs",
        "damp_percent",
        "dataset",
        "max_input_length",
        "meta",
        "model_file_base_name",
        "model_name_or_path",
        "model_seqlen",
        "module_name_preceding_first_block",
        "modules_in_block_to_quantize",
        "pad_token_id",
        "quantizer",
        "static_groups",
        "tokenizer",
        "true_sequential",
        "use_cuda_fp16",
        *AUTOROUND_KEYS,
    }
)


class Gptq(SafetensorsFormat):
    """GPTQ: 2, 3, 4 or 8 bits, groups or channels, float16 scales, natural order of the inputs.

    Args:
        checkpoint_format: how the files that are read have their zero points, V1 or V2; by default as they are
            written here.
        borrows: a zero point of 0 borrows from the next one in v1, as gptqmodel has it; without, it is refused.
    """

    name = "gptq"
    suffixes: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    scale_suffix, shape_suffix = "scales", "qweight"
    stores_every_zero = True
    bits: tuple[int, ...] = BITS
    """How many bits a code may have."""

    def __init__(self, checkpoint_format: str | None = None, borrows: bool = False) -> None:
        self.checkpoint_format, self.borrows = checkpoint_format, borrows

    def _not_held(self, grid: Grid) -> str | None:
        if grid.bits not in self.bits:
            return f"{self.name} holds {', '.join(map(str, self.bits[:-1]))} or {self.bits[-1]} bits, not {grid.bits}"
        if grid.group_size is not None and grid.group_size < 1:
            return f"a group size of {grid.group_size} is not a number of inputs"
        if grid.scale_dtype != torch.float16:
            return f"{self.name} stores scales as float16, not {name_of(grid.scale_dtype)}"
        return None

    def holds_layer(self, name: str, out_features: int, in_features: int, transposed: bool, grid: Grid) -> str | None:
        """None, or why not: codes fill whole words down each column, zero points along each row."""
        reason = super().holds_layer(name, out_features, in_features, transposed, grid)
        if reason is not None:
            return reason
        for count, what in ((in_features, "inputs"), (out_features, "outputs")):
            if count * grid.bits % WORD:
                multiple = WORD // math.gcd(WORD, grid.bits)
                return (
                    f"{name} has {count} {what}, which at {grid.bits} bits do not fill words of {WORD} bits; "
                    f"{self.name} needs a multiple of {multiple}"
                )
        return None

    def _laid_out(self, prefix: str, quantized: Quantized) -> dict[str, Tensor]:
        """The tensors of a layer."""
        grid, in_features = quantized.grid, quantized.codes.shape[1]
        zeros = pack_codes(quantized.zero.T, grid.bits)
        stored = {
            f"{prefix}.qweight": pack_codes(quantized.codes, grid.bits).T.contiguous(),
            f"{prefix}.qzeros": _add(zeros, -1, grid, len(quantized.zero)) if self._label(grid) == V1 else zeros,
            f"{prefix}.scales": quantized.scale.T.contiguous(),
        }
        return stored | ({f"{prefix}.g_idx": _natural(in_features, grid)} if "g_idx" in self.suffixes else {})

    def quantization_config(self, grids: Mapping[str, Grid], ignored: list[str]) -> dict[str, Any]:
        """One grid for all; where more than the head is kept, the layers that are quantized are named.

        Without that list readers take every Linear module of the blocks for quantized.
        """
        (grid,) = set(grids.values())
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": grid.bits,
            "group_size": -1 if grid.group_size is None else grid.group_size,
            "sym": grid.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": V1 if grid.symmetric else V2,
        }
        return config | ({"modules_in_block_to_quantize": [sorted(grids)]} if set(ignored) - {"lm_head"} else {})

    def files(self, quantization_config: Mapping[str, Any]) -> dict[str, object]:
        """AutoGPTQ's own name for the same."""
        return {"quantize_config.json": dict(quantization_config)}

    def loaders(self, grids: Collection[Grid], apart: str | None = None) -> str:
        # As gptqmodel 7.7 and vLLM 0.32 do on a CPU; what vLLM does on a GPU is read from its source, not run.
        (grid,) = grids
        where = "transformers loads it with gptqmodel and optimum"
        if grid.bits == 4 and grid.group_size is None:
            where += " (on a CPU not where a layer has more than 256 inputs)"
        if not grid.symmetric or grid.bits < 4:
            return f"{where}; vLLM does not"
        if apart:
            return f"{where}; vLLM does not: {apart}"
        return f"{where}, and vLLM serves it" if grid.bits == 4 else f"{where}; vLLM should on a GPU (not tried)"

    def described_by(self, quantization_config: Mapping[str, Any]) -> "Gptq":
        """As `checkpoint_format` says, which newer files repeat as `format`; v1 where there is neither."""
        given = [quantization_config.get(key) for key in ("checkpoint_format", "format")]
        labels = [label for label in given if label is not None] or [V1]
        for label in labels:
            if label not in (V1, V2):
                raise unread("checkpoint_format", repr(label), f"{V1!r}, {V2!r} or no such key")
        if labels[0] != labels[-1]:
            raise unread("checkpoint_format", f"{labels[0]!r} and format {labels[1]!r}", "two that are the same")
        meta = quantization_config.get("meta")
        return Gptq(labels[0], "gptqmodel:" in str(meta.get("quantizer")) if isinstance(meta, Mapping) else False)

    def shape(
        self, prefix: str, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], Tensor], grid: Grid
    ) -> tuple[int, int]:
        """As `qweight` has it; what else there is must fit."""
        name = f"{prefix}.qweight"
        if name not in shapes:
            raise refusal(name, "it is missing")
        if len(shapes[name]) != 2 or 0 in shapes[name] or shapes[name][0] * WORD % grid.bits:
            raise refusal(name, f"its shape is {list(shapes[name])}, of which {grid.bits} bits make no matrix")
        return shapes[name][1], shapes[name][0] * WORD // grid.bits

    def read(self, prefix: str, tensors: Mapping[str, Tensor], grid: Grid) -> Quantized:
        """One layer, its zero points as `checkpoint_format` has them."""
        take_nothing_else(tensors, prefix, self.suffixes)
        out_features, in_features = self.shape_read(prefix, tensors, grid)
        groups = grid.groups(in_features)
        words = (in_features * grid.bits // WORD, out_features)
        packed = take(tensors, f"{prefix}.qweight", torch.int32, words)
        scale = take_scale(tensors, f"{prefix}.scales", grid.scale_dtype, (groups, out_features))
        stored = take(tensors, f"{prefix}.qzeros", torch.int32, (groups, out_features * grid.bits // WORD))
        if "g_idx" in self.suffixes:
            order = take(tensors, f"{prefix}.g_idx", torch.int32, (in_features,))
            if not torch.equal(order, _natural(in_features, grid)):
                why = "its inputs are not in their natural order (activation order, desc_act)"
                raise refusal(f"{prefix}.g_idx", f"{why}; read is input // group_size")
        codes = unpack_codes(packed.T, grid.bits, in_features)
        zero = self._zero_points(f"{prefix}.qzeros", stored, grid, out_features)
        return Quantized(codes, scale.T.contiguous(), zero.T.contiguous(), grid)

    def _label(self, grid: Grid) -> str:
        """How zero points are stored."""
        return self.checkpoint_format or (V1 if grid.symmetric else V2)

    def _zero_points(self, name: str, stored: Tensor, grid: Grid, out_features: int) -> Tensor:
        """What stored zero points [groups, words] stand for, [groups, out]."""
        label, zero = self._label(grid), unpack_codes(stored, grid.bits, out_features)
        if label == V1:
            if bool((zero == grid.levels).any()) and not self.borrows:
                why = f"v1 stores z - 1, and for {grid.levels} readers disagree whether z is 0 or {grid.levels + 1}"
                raise refusal(name, f"a zero point is out of range: {why}")
            zero = unpack_codes(_add(stored, 1, grid, out_features), grid.bits, out_features)
        if grid.symmetric and not bool((zero == grid.middle).all()):
            why = f"a symmetric grid has {grid.middle} everywhere, and as {label!r} this has {int(zero.min())} to "
            raise refusal(name, f"{why}{int(zero.max())}; checkpoint_format may be wrong, or sym")
        return zero

    def grids_of(self, config: Mapping[str, Any], scale_dtype: torch.dtype) -> Callable[[str], Grid]:
        """The grid of every quantized layer but those that `dynamic` speaks of."""
        rest = dict(config)
        self.described_by(config)
        for key in ("checkpoint_format", "format"):
            rest.pop(key, None)
        expect(rest, "quant_method", "gptq")
        expect(rest, "method", None, "gptq")
        # With activation order the groups may still be in their natural one; each layer's g_idx tells.
        expect(rest, "desc_act", False, True)
        expect(rest, "lm_head", None, False, True)  # whether it is quantized its tensors tell
        expect(rest, "is_marlin_format", None, False)
        expect(rest, "pack_dtype", None, "int32")
        integers_only(rest)
        dynamic = rest.pop("dynamic", None) or {}
        settings = {key: rest.pop(key, None) for key in SETTINGS}
        nothing_left(rest, NEUTRAL_KEYS)
        if not isinstance(dynamic, Mapping):
            raise unread("dynamic", repr(dynamic), "a JSON object")
        every = described(self, settings, scale_dtype)
        return by_layer([self._rule(name, dynamic[name], settings, scale_dtype) for name in dynamic], every)

    def _rule(self, name: str, changes: object, settings: Mapping[str, Any], scale_dtype: torch.dtype) -> Rule:
        """What `dynamic` says of the layers that a pattern names."""
        sign, colon, pattern = name.partition(":")
        if colon != ":" or sign not in ("+", "-"):
            sign, pattern = "+", name
        begins = compiled(f"dynamic: {name}", pattern).match
        if sign == "-":
            return begins, None
        where = f"quantization_config: dynamic: {name}"
        if not isinstance(changes, Mapping):
            raise unread(name, repr(changes), "a JSON object", "dynamic")
        if unknown := sorted(set(changes) - set(SETTINGS) - DYNAMIC_NEUTRAL):
            raise unread(unknown[0], repr(changes[unknown[0]]), "settings without this key", where)
        changed = {key: changes[key] for key in SETTINGS if key in changes}
        return begins, described(self, {**settings, **changed}, scale_dtype)


def _add(words: Tensor, one: int, grid: Grid, outputs: int) -> Tensor:
    """Packed zero points [groups, words], each with 1 or -1 added.

    What carries goes into the next one of the word, as gptqmodel has it, but where codes cross words it is dropped.
    """
    if WORD % grid.bits == 0:
        return words + one * sum(1 << place for place in range(0, WORD, grid.bits))
    return pack_codes((unpack_codes(words, grid.bits, outputs) + one) & grid.levels, grid.bits)


def _natural(in_features: int, grid: Grid) -> Tensor:
    """The group of each input, int32 [in]."""
    size = in_features if grid.group_size is None else grid.group_size
    return (torch.arange(in_features) // size).int()
