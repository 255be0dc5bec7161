"""What follows a model's last block: the final norm and the vocabulary projection, frozen."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Head(nn.Module):
    """What turns the last block's output into logits, frozen.

    hidden = after(x), usually the final norm; z = (hidden @ weight.T + bias) * scale; soft_cap * tanh(z / soft_cap).
    """

    def __init__(
        self,
        after: Mapping[str, nn.Module],
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        soft_cap: float | None,
    ) -> None:
        super().__init__()
        self.after = nn.ModuleList(after.values())
        self.after_names = list(after)
        self.weight = weight
        self.bias = bias
        self.scale = scale
        self.soft_cap = soft_cap

    def hidden(self, x: Float[Tensor, "... d_block"]) -> Float[Tensor, "... d"]:
        """The hidden states that the vocabulary projection reads."""
        for module in self.after:
            x = module(x)
        return x

    def logits(self, hidden: Float[Tensor, "... d"]) -> Float[Tensor, "... vocabulary"]:
        """Logits of `hidden` states, at least float32, also where head and hidden states are held in 16 bits."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        if flat.is_cuda and flat.dtype != torch.float32:
            projected = torch.mm(flat, self.weight.T, out_dtype=torch.float32)
        else:
            projected = flat.to(self.weight.dtype) @ self.weight.T
        projected = projected.to(torch.promote_types(projected.dtype, torch.float32))
        if self.bias is not None:
            projected += self.bias
        return self.transform(projected).view(*hidden.shape[:-1], self.weight.shape[0])

    def transform(self, projected: Float[Tensor, "... vocabulary"]) -> Float[Tensor, "... vocabulary"]:
        """The logit scale and soft-cap."""
        z = projected if self.scale == 1 else projected * self.scale
        return z if self.soft_cap is None else self.soft_cap * torch.tanh(z / self.soft_cap)
