"""What formats refuse alike: weights off their grid, tensors and config keys that are not what they should be."""

from collections.abc import Mapping

import torch
from torch import Tensor

from logitwise.errors import FormatError
from logitwise.grid import Quantized


def type_name(dtype: torch.dtype) -> str:
    """A type as people write it: float16."""
    return str(dtype).removeprefix("torch.")


def check_on_grid(prefix: str, quantized: Quantized) -> None:
    """Refuses what no packed form could give back: a value beyond the bits, a zero point that a grid does not have.

    Errors: FormatError, naming the layer.
    """
    grid = quantized.grid
    remedy = "quantize this layer again; if that does not help, report it as a bug"
    groups = (quantized.codes.shape[0], grid.groups(quantized.codes.shape[1]))
    for what, tensor, dtype in (("scale", quantized.scale, grid.scale_dtype), ("zero", quantized.zero, torch.uint8)):
        if tuple(tensor.shape) != groups or tensor.dtype != dtype:
            found = f"{type_name(tensor.dtype)} {list(tensor.shape)}"
            why = f"its grid asks for {type_name(dtype)} {list(groups)}"
            raise FormatError(f"{prefix}: {what} is {found}", why, remedy)
    for what, tensor in (("code", quantized.codes), ("zero point", quantized.zero)):
        if int(tensor.max()) > grid.levels:
            why = f"{grid.bits} bits hold 0 to {grid.levels}"
            raise FormatError(f"{prefix}: {what} {int(tensor.max())} is out of range", why, remedy)
    if grid.symmetric and not bool((quantized.zero == grid.middle).all()):
        why = f"a symmetric grid stores none; all must be {grid.middle}"
        raise FormatError(f"{prefix}: zero points differ from {grid.middle}", why, remedy)


def refusal(name: str, why: str) -> FormatError:
    """A tensor that is not read."""
    return FormatError(f"tensor {name} is refused", why, "check that the checkpoint is complete and its config its own")


def take(
    tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, shape: tuple[int, ...], hint: str = ""
) -> Tensor:
    """A tensor of the type and shape that the config asks for.

    Args:
        tensors: of a layer, by full name.
        name: the one wanted.
        dtype: its type.
        shape: its shape.
        hint: what else may explain another shape.

    Errors: FormatError, naming it, with what was expected and what was found.
    """
    if name not in tensors:
        raise refusal(name, "it is missing")
    tensor = tensors[name]
    if tensor.dtype == dtype and tuple(tensor.shape) == shape:
        return tensor
    expected, found = f"{type_name(dtype)} {list(shape)}", f"{type_name(tensor.dtype)} {list(tensor.shape)}"
    raise refusal(name, f"expected {expected}, found {found}" + (f"; {hint}" if hint else ""))


def unread(where: str, key: str, found: str, expected: str) -> FormatError:
    """A key of config.json, in the table `where`, with a value that is not read."""
    why = f"it says {found}; logitwise reads {expected}"
    return FormatError(f"{where}: {key} is not read", why, "give another checkpoint")
