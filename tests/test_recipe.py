"""Recipes: what is asked, checked before anything is done."""

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import logitwise
from logitwise import recipe as module
from logitwise.errors import RecipeError
from logitwise.grid import Grid
from logitwise.polish import POLISHED
from logitwise.preflight import check_roles
from logitwise.quantizers import QUANTIZERS
from logitwise.recipe import FALLS_WITH, PRESETS, REFIT, Learning, Recipe, parse_settings
from logitwise.windows import check_windows, roles_of

PACKAGE = Path(logitwise.__file__).parent


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_load(preset: str) -> None:
    recipe = Recipe.load(preset)
    assert recipe.method in QUANTIZERS
    assert recipe != Recipe.load({"standard": "quick"}.get(preset, "standard"))


def test_every_shipped_file_is_a_preset_or_a_methods_own() -> None:
    shipped = {path.stem for path in (PACKAGE / "recipes").glob("*.toml")}
    assert shipped == set(PRESETS) | set(QUANTIZERS) | {REFIT, "polish"}


def test_standard_is_the_default_and_changes_win() -> None:
    assert Recipe.load() == Recipe.load("standard")
    recipe = Recipe.load("quick", steps=7, bits=3)
    assert (recipe.steps, recipe.bits, recipe.rows) == (7, 3, Recipe.load("quick").rows)


def test_a_file_is_read_over_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('bits = 3\n[learning.scale]\noptimizer = "adam"\nrate = 0.5\nschedule = "linear"\n')
    for given in (file, str(file)):
        recipe = Recipe.load(given, group_size=None)
        assert (recipe.bits, recipe.group_size, recipe.steps) == (3, None, Recipe().steps)
    assert recipe.learning_of("scale") == Learning(optimizer="adam", rate=0.5, schedule="linear")
    assert recipe.learning_of("rounding") == Recipe().learning_of("rounding")


LEARNING = """[learning.scale]
optimizer = "adam"
rate = 0.5
schedule = "linear"
"""


@pytest.mark.parametrize(
    ("file", "changes", "left"),
    [
        (f'method = "flexround"\n{LEARNING}', {"method": "rtn"}, set()),
        (f'method = "flexround"\n{LEARNING}', {"method": "flexround"}, {"learning"}),
        (LEARNING, {"method": "rtn"}, {"learning"}),
        (f'method = "flexround"\n{LEARNING}', {"polish": True, "objective": "mse"}, {"learning"}),
        ('objective = "topk"\nobjective_settings = {k = 8}', {"objective": "lfq"}, set()),
        ('objective = "topk"\nobjective_settings = {k = 8}', {"bits": 3}, {"objective_settings"}),
        ("polish = true\npolish_steps = 7\npolish_fresh = true", {"polish": False}, set()),
        ("polish_steps = 7", {"polish": True}, {"polish_steps"}),
        ("polish = false\npolish_steps = 7", {"polish": True}, {"polish_steps"}),
        ("polish = true\npolish_steps = 7", {"polish": False, "polish_steps": 9}, {"polish_steps"}),
    ],
)
def test_what_a_file_says_of_its_own_choice_falls_with_it(
    tmp_path: Path, file: str, changes: dict[str, Any], left: set[str]
) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text(file)
    recipe = Recipe.load(mine, **changes)
    of_a_choice = {key for keys in FALLS_WITH.values() for key in keys}
    assert {key for key in of_a_choice if getattr(recipe, key) != getattr(Recipe(), key)} == left
    assert recipe.but(**changes) == recipe


def test_a_recipe_is_frozen_and_but_makes_another() -> None:
    recipe = Recipe()
    with pytest.raises(ValidationError, match="frozen"):
        recipe.bits = 3
    assert recipe.but(bits=3).bits == 3
    assert recipe.but(bits=3).but(bits=4) == recipe
    with pytest.raises(RecipeError, match="bits = 9 is not possible"):
        recipe.but(bits=9)


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("bit", "bits"),
        ("groupsize", "group_size"),
        ("step", "steps"),
        ("heldout", "held_out"),
        ("calibrate", "calibration"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(key: str, nearest: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown recipe key {key}\n.*\n.*did you mean {nearest}[?]"):
        Recipe.load("quick", **{key: 1})


def test_a_key_like_no_other_is_refused_with_all_of_them() -> None:
    with pytest.raises(
        RecipeError, match=r"unknown recipe key xyzzy\n.*\n.*known keys: bits, group_size, .*compute_dtype"
    ):
        Recipe.of({"xyzzy": 1})


@pytest.mark.parametrize("wrong", [0, -1, "0", "ALL", "many", 1.5])
def test_final_blocks_are_a_number_or_all(wrong: object) -> None:
    assert [Recipe.load(None, final_blocks=given).final_blocks for given in (3, "3", "all")] == [3, 3, "all"]
    message = f"final_blocks = {wrong!r} is not possible\n.*it should be a number of at least 1, or all"
    with pytest.raises(RecipeError, match=message):
        Recipe.load(None, final_blocks=wrong)


def test_an_unknown_key_of_a_learning_table_is_refused_with_its_own_nearest() -> None:
    scale = {"optimizer": "adam", "rtae": 0.5, "schedule": "linear", "rate": 0.5}
    with pytest.raises(RecipeError, match=r"unknown recipe key learning\.scale\.rtae\n.*\n.*did you mean rate[?]"):
        Recipe.of({"learning": {"scale": scale}})


def test_an_unknown_key_of_a_stage_is_refused_with_its_own_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe key stages\.0\.slot\n.*\n.*did you mean slots[?]"):
        Recipe.of({"stages": [{"slot": ["*"], "slots": ["*"], "at": "own"}]})


def test_stages_are_the_methods_own_unless_the_recipe_has_others(tmp_path: Path) -> None:
    assert Recipe().block_stages == ()
    assert [stage.at for stage in Recipe(method="gsq").block_stages] == ["own", "common"]
    assert Recipe.load(None, method="gsq", **parse_settings(["stages=[]"])).block_stages == ()
    mine = tmp_path / "mine.toml"
    mine.write_text('method = "gsq"\n[[stages]]\nslots = ["*.up_proj"]\nat = "own"\n')
    assert [stage.slots for stage in Recipe.load(mine).block_stages] == [("*.up_proj",)]
    assert Recipe.load(mine, method="flexround").block_stages == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "bits = 1 is not possible\n.*greater than or equal to 2\n.*bits is: bits a weight"),
        ({"bits": 9}, "bits = 9 is not possible\n.*less than or equal to 8"),
        ({"bits": "four"}, "bits = 'four' is not possible\n.*valid integer"),
        ({"bits": 3.5}, "bits = 3.5 is not possible"),
        ({"group_size": 7}, "group_size = 7 is not possible\n.*greater than or equal to 8"),
        ({"scale_dtype": "float8"}, "scale_dtype = 'float8' is not possible\n.*'float16', 'bfloat16' or 'float32'"),
        ({"steps": -1}, "steps = -1 is not possible"),
        ({"rows": 0}, "rows = 0 is not possible"),
        ({"batch": 0}, "batch = 0 is not possible"),
        ({"held_out": -1}, "held_out = -1 is not possible"),
        ({"seed": -1}, "seed = -1 is not possible"),
        ({"keep": "lm_head"}, "keep = 'lm_head' is not possible\n.*tuple"),
        (
            {"learning": {"scale": {"optimizer": "adam", "rate": 0, "schedule": "linear"}}},
            r"learning\.scale\.rate = 0 is",
        ),
        (
            {"learning": {"scale": {"optimizer": "lino", "rate": 1, "schedule": "linear"}}},
            r"learning\.scale\.optimizer",
        ),
        (
            {"learning": {"scale": {"optimizer": "adam", "rate": 1, "schedule": "linear", "decay": 0.1}}},
            r"learning\.scale = .*\n.*adam has no decay, lion has",
        ),
        (
            {"learning": {"scale": {"optimizer": "lion", "rate": 1, "schedule": "linear", "decay": -0.1}}},
            r"learning\.scale\.decay = -0.1 is not possible\n.*greater than or equal to 0",
        ),
        ({"stages": [{"slots": ["*"], "at": "end"}]}, r"stages\.0\.at = 'end' is not possible\n.*'own' or 'common'"),
        ({"stages": [{"slots": [], "at": "own"}]}, r"stages\.0\.slots = .* is not possible\n.*at least 1 item"),
        ({"learning": {"scale": {"rate": 1, "schedule": "linear"}}}, r"learning\.scale\.optimizer .*\n.*required"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_is_asked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        Recipe.of(settings)
    assert refused.value.exit_code == 2


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe quik; did you mean quick\?\n.*quick, standard, best"):
        Recipe.load("quik")
    with pytest.raises(RecipeError, match=r"no recipe .*nowhere\.toml\n.*\n.*path of a TOML file"):
        Recipe.load(tmp_path / "nowhere.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("bits = = 4")
    with pytest.raises(RecipeError, match=r"broken\.toml cannot be read\n.*line 1"):
        Recipe.load(broken)
    broken.write_bytes(b"\xff\xfe\x00bits")
    with pytest.raises(RecipeError, match=r"broken\.toml cannot be read\n.*utf-8"):
        Recipe.load(broken)
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load(tmp_path)


def test_pairs_of_the_command_line_are_read_as_toml_else_as_text() -> None:
    pairs = [
        "steps=5",
        "symmetric = true",
        "calibration=text:a=b.txt",
        'keep=["*.mlp.*"]',
        "group_size=none",
        "seed=0x10",
    ]
    settings = parse_settings(pairs)
    assert settings == {
        "steps": 5,
        "symmetric": True,
        "calibration": "text:a=b.txt",
        "keep": ["*.mlp.*"],
        "group_size": None,
        "seed": 16,
    }
    assert Recipe.of(settings).keep == ("*.mlp.*",)
    table = parse_settings(['learning={scale={optimizer="adam", rate=1e-3, schedule="cosine"}}'])
    assert Recipe.of(table).learning_of("scale").rate == 1e-3
    assert parse_settings([]) == {}
    with pytest.raises(RecipeError, match=r"--set steps has no value\n.*key=value"):
        parse_settings(["steps"])


def test_a_file_says_channel_where_python_says_none(tmp_path: Path) -> None:
    (file := tmp_path / "recipe.toml").write_text('group_size = "channel"\nbits = 3\n')
    assert Recipe.load(file).grid == Grid(3, None, False, torch.float16)
    with pytest.raises(RecipeError, match="group_size = 'row' is not possible"):
        Recipe.of({"group_size": "row"})


def test_the_grid_is_the_recipes() -> None:
    recipe = Recipe(bits=3, group_size=32, symmetric=True, scale_dtype="bfloat16")
    assert recipe.grid == Grid(3, 32, True, torch.bfloat16)
    assert Recipe().grid == Grid(4, 64, False, torch.float16)


@pytest.mark.parametrize(("given", "rows", "expected"), [(None, 16, 16), (None, 1024, 128), (0, 256, 0), (5, 256, 5)])
def test_held_out_rows_are_an_eighth_and_at_least_sixteen(given: int | None, rows: int, expected: int) -> None:
    assert Recipe(held_out=given, rows=rows).held_out_rows == expected


def fields_read() -> set[str]:
    """Fields of a recipe that the package reads outside recipe.py, itself or through the recipe's own members."""
    read: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        if path != Path(module.__file__):
            read |= attributes_of("recipe", ast.parse(path.read_text("utf-8")))
    own = next(
        n for n in ast.parse(Path(module.__file__).read_text("utf-8")).body if getattr(n, "name", "") == "Recipe"
    )
    for member in own.body:
        if isinstance(member, ast.FunctionDef) and member.name in read:
            read |= attributes_of("self", member)
    return read


def attributes_of(name: str, tree: ast.AST) -> set[str]:
    """Every x of `name.x` and `something.name.x`."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (getattr(node.value, "id", None) == name or getattr(node.value, "attr", None) == name)
    }


def test_no_option_is_there_that_nothing_reads() -> None:
    assert set(Recipe.model_fields) - fields_read() == set()


def test_every_option_says_what_it_is() -> None:
    assert [name for name, field in Recipe.model_fields.items() if not field.description and name != "seed"] == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["dual_scale", "awq"], ("awq", "dual_scale")),
        (["awq", "awq"], ("awq",)),
        ("awq", ("awq",)),
        ("dual_scale, awq", ("awq", "dual_scale")),
        ([], ()),
    ],
)
def test_rewrites_have_one_order(given: object, expected: tuple[str, ...]) -> None:
    assert Recipe.load(None, rewrites=given).rewrites == expected


def test_rewrites_are_named_on_the_command_line() -> None:
    for pair in ("rewrites=dual_scale,awq", 'rewrites=["dual_scale", "awq"]'):
        assert Recipe.load(None, **parse_settings([pair])).rewrites == ("awq", "dual_scale")
    with pytest.raises(RecipeError, match=r"rewrites.* is not possible"):
        Recipe.load(None, **parse_settings(["rewrites=smooth,awq"]))
    with pytest.raises(RecipeError, match=r"rewrites.* is not possible"):
        Recipe.load(None, **parse_settings(["rewrites=[[1]]"]))


def test_a_constant_rate_has_no_end() -> None:
    constant = {"optimizer": "adam", "rate": 1e-3, "schedule": "constant", "end": 0.1}
    with pytest.raises(RecipeError, match="falls to no end"):
        Recipe.load(None, learning={"scale": constant})


def test_every_key_is_in_the_options_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "options.md").read_text("utf-8")
    given = {key: (f"`{key}", f"`--set {key}=", f"--{key.replace('_', '-')}") for key in Recipe.model_fields}
    missing = [key for key, ways in given.items() if not any(way in page for way in ways)]
    assert not missing


def test_the_recipe_in_the_options_page_is_one() -> None:
    page = (Path(__file__).parent.parent / "docs" / "options.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    recipe = Recipe.load(None, **tomllib.loads(example))
    check_windows(recipe, 4)
    check_roles(
        {"learning": (recipe.learning, roles_of(recipe)), "polish_learning": (recipe.polish_learning, POLISHED)}
    )
    assert recipe.grid_of("model.layers.0.mlp.up_proj").bits == 4
