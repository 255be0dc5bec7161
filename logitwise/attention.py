"""Fused attention whose gradients are the same bits each time.

On a GPU its kernels add gradients up in whatever order their parts are done. Flash and memory-efficient attention have
an ordered form, which torch takes where it is to refuse everything that has none; cuDNN's has none. Asked for in all
of a run, that strictness would stop models that use other operations (cumulative sums, say), and products of matrices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import Node
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

ORDERED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@contextmanager
def ordered_attention() -> Iterator[None]:
    """Where torch is to use deterministic algorithms, attention called in this context goes backward by one."""
    with sdpa_kernel(ORDERED), _Ordered():
        yield


class _Ordered(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is scaled_dot_product_attention and (kernel := _kernel(out.grad_fn)):
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            kernel.register_prehook(lambda _: warn_strictly(True))
            kernel.register_hook(lambda *_: warn_strictly(not warn_only))
        return out


def _kernel(node: Node | None) -> Node | None:
    """The node of a fused kernel; none where attention is written out, of which all operations are ordered.

    What a kernel gives is cut where the heads' size is no multiple of 8.
    """
    before = node.next_functions[0][0] if node and node.next_functions else None
    return next((one for one in (node, before) if one and one.name().startswith("ScaledDotProduct")), None)


def warn_strictly(strictly: bool) -> None:
    """Whether torch refuses operations that are not deterministic, where it is to avoid them, or warns of them."""
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=not strictly)
