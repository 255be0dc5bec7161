"""Fused attention whose gradients are the same bits each time.

On a GPU its kernels add gradients up in whatever order their parts are done. Flash and memory-efficient attention have
an ordered form, which torch takes where it is to refuse everything that has none; cuDNN's has none. Asked for in all
of a run, that strictness would stop models that use other operations (cumulative sums, say), and products of matrices.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
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
        # The fused kernels alone are one node: where attention is written out, all its operations are ordered.
        if func is scaled_dot_product_attention and out.grad_fn and out.grad_fn.name().startswith("ScaledDotProduct"):
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            out.grad_fn.register_prehook(lambda _: _warn_only(False))
            out.grad_fn.register_hook(lambda *_: _warn_only(warn_only))
        return out


def _warn_only(warn_only: bool) -> None:
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=warn_only)
