"""Which layers a pattern of `--keep` names."""

import pytest

from logitwise.audit import matches


@pytest.mark.parametrize(
    ("pattern", "named"),
    [
        ("layers.1", ["model.layers.1.mlp.up_proj"]),
        ("up_proj", ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"]),
        ("layers.1*", ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj"]),
        ("layers.[02].mlp", ["model.layers.2.mlp.down_proj"]),
        ("model.layers.2.mlp.down_proj", ["model.layers.2.mlp.down_proj"]),
        ("*.mlp.*", ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.2.mlp.down_proj"]),
        (".2.", []),
        ("*.", []),
        ("proj", []),
        ("*down*", ["model.layers.2.mlp.down_proj"]),
    ],
)
def test_a_pattern_names_whole_parts(pattern: str, named: list[str]) -> None:
    modules = ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.2.mlp.down_proj"]
    assert [module for module in modules if matches(pattern, module)] == named
