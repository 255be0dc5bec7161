"""Layers that vLLM computes as one, since they read the same hidden states: they have to lie on one grid.

Seen with vLLM 0.32: compressed-tensors, GPTQ and AWQ with one of them in full precision are refused.
"""

from collections.abc import Collection, Mapping

from logitwise.grid import Grid

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def unfusable(grids: Mapping[str, Grid], linear: Collection[str]) -> str | None:
    """Why some layers cannot be fused; None where all can.

    Args:
        grids: of quantized layers, by module.
        linear: all linear modules of the model.
    """
    there = set(linear)
    for module in grids:
        parent, _, own = module.rpartition(".")
        for names in FUSED:
            together = [f"{parent}.{name}" for name in names if own in names and f"{parent}.{name}" in there]
            if len({grids.get(one) for one in together}) > 1:
                return f"vLLM fuses {', '.join(names)} of {parent}, which do not lie on one grid"
    return None
