"""What vLLM fuses has to lie on one grid; where it does not, nobody is told that vLLM serves it."""

import pytest

from logitwise.formats import FORMATS, choose, unfusable
from logitwise.grid import Grid

FOUR, THREE = Grid(4, 64, True), Grid(3, 64, True)
BLOCK = "model.layers.1"
LINEAR = [
    *(f"{BLOCK}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(f"{BLOCK}.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")),
    "lm_head",
]


def grids(**others: Grid | None) -> dict[str, Grid]:
    """All layers on one grid, but for those that are named, perhaps on none."""
    found = {module: others.get(module.rpartition(".")[2], FOUR) for module in LINEAR[:-1]}
    return {module: grid for module, grid in found.items() if grid is not None}


@pytest.mark.parametrize("others", [{}, {"o_proj": None}, {"down_proj": THREE}, {"gate_proj": THREE, "up_proj": THREE}])
def test_layers_that_are_fused_on_one_grid(others: dict[str, Grid | None]) -> None:
    assert unfusable(grids(**others), LINEAR) is None


@pytest.mark.parametrize("others", [{"k_proj": THREE}, {"q_proj": None}, {"q_proj": None, "k_proj": None}])
def test_layers_that_are_fused_on_several(others: dict[str, Grid | None]) -> None:
    assert unfusable(grids(**others), LINEAR) == (
        f"vLLM fuses q_proj, k_proj, v_proj of {BLOCK}.self_attn, which do not lie on one grid"
    )


def test_a_layer_without_its_usual_neighbour() -> None:
    """Nemotron's up_proj has no gate."""
    assert unfusable({f"{BLOCK}.mlp.up_proj": FOUR}, [f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj"]) is None


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq"])
def test_vllm_is_said_to_serve_only_what_it_can_fuse(name: str) -> None:
    apart = unfusable(grids(up_proj=None), LINEAR)
    assert FORMATS[name].loaders({FOUR}).endswith("vLLM serves it")
    assert FORMATS[name].loaders({FOUR}, apart).endswith(f"vLLM does not: {apart}")
    assert choose({FOUR}, apart)[1].endswith(f"vLLM does not: {apart}")
