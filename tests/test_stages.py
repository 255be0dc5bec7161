"""Stages inside a block: what is learned when, by which error, and what the other slots are meanwhile."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import VOCABULARY, MemorySource, tiny_model
from source_files import llama_config, random_model, save
from torch import Tensor

import logitwise
from logitwise import stages
from logitwise.calibration.rows import Rows
from logitwise.descent import Schedule
from logitwise.errors import SourceError
from logitwise.fit import Data, Fitted, Window, fit
from logitwise.grid import Grid
from logitwise.objectives import OBJECTIVES
from logitwise.quantizers import QUANTIZERS, STARTS, Quantizer
from logitwise.recipe import BlockStage, Recipe
from logitwise.runfolder import RunFolder
from logitwise.skeleton import Skeleton, Slot
from logitwise.stages import Inside, Part, fit_parts, parts_of
from logitwise.stream import Walk
from logitwise.watch import Stage, Watcher
from logitwise.windows import plan_steps

TOKENS, TRAIN, HELD_OUT, BATCH = 11, 8, 4, 4
GSQ = Recipe(method="gsq").block_stages
CPU = torch.device("cpu")


def none_kept(slot: Slot) -> bool:
    return False


def skeleton_of(family: str) -> Skeleton:
    return Skeleton(MemorySource(tiny_model(family)), CPU, torch.float32)


def leaves(part: Part) -> list[str]:
    return [slot.module.rpartition(".")[2] for slot in part.slots]


# ---- which slots, and where their error is taken


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [(["q_proj", "k_proj"], ["q_proj", "k_proj"]), (["v_proj", "o_proj"], [""])]),
        ("opt", [(["k_proj", "q_proj"], ["k_proj", "q_proj"]), (["v_proj", "out_proj"], [""])]),
        ("phi3", [(["o_proj", "qkv_proj"], [""])]),
        ("gpt-neox", []),
        ("gpt2", []),
    ],
)
def test_gsq_learns_q_and_k_then_v_and_o_and_where_they_are_fused_all_at_once(
    family: str, expected: list[tuple[list[str], list[str]]]
) -> None:
    parts = parts_of(GSQ, skeleton_of(family).slots(1), none_kept)
    found = [(leaves(part), [end.removeprefix("self_attn").removeprefix(".") for end in part.ends]) for part in parts]
    assert found == expected


def test_parts_are_of_slots_that_are_learned_and_ends_of_all_that_are_named() -> None:
    slots = skeleton_of("llama").slots(0)
    kept = parts_of(GSQ, slots, lambda slot: slot.module.endswith(("q_proj", "k_proj", "o_proj")))
    assert [(leaves(part), part.ends) for part in kept] == [(["v_proj"], ("self_attn",))]
    kept = parts_of(GSQ, slots, lambda slot: slot.module.endswith("q_proj"))
    assert (leaves(kept[0]), kept[0].ends) == (["k_proj"], ("self_attn.k_proj",))
    assert [part.weights for part in parts_of(GSQ, slots, none_kept)] == [
        sum(s.out_features * s.in_features for s in slots if s.module.endswith(named))
        for named in (("q_proj", "k_proj"), ("q_proj", "k_proj", "v_proj", "o_proj"))
    ]


def test_a_slot_belongs_to_the_first_stage_that_names_it_and_far_slots_share_the_block() -> None:
    slots = skeleton_of("llama").slots(0)
    asked = [
        BlockStage(slots=("*.q_proj",), at="common"),
        BlockStage(slots=("*.q_*", "*.up_proj", "*.v_proj"), at="common"),
    ]
    parts = parts_of(asked, slots, none_kept)
    assert [(leaves(part), part.ends) for part in parts] == [
        (["q_proj"], ("self_attn.q_proj",)),
        (["v_proj", "up_proj"], ("",)),
    ]


# ---- a window that ends inside its block


@dataclass
class Setting:
    """One block, what enters it and what it is made of."""

    skeleton: Skeleton
    window: Window
    data: Data

    def quantizers(self, method: str = "gsq") -> dict[Slot, Quantizer]:
        return self.window.quantizers(QUANTIZERS[method], lambda _: Grid(2, 16, True), STARTS["searched"])

    def parts(self) -> list[Part]:
        return parts_of(GSQ, self.window.slots, none_kept)


@pytest.fixture(scope="module")
def setting() -> Setting:
    skeleton = skeleton_of("llama-biased")
    ids = torch.randint(VOCABULARY, (TRAIN + HELD_OUT, TOKENS), generator=torch.Generator().manual_seed(3))
    hidden = skeleton.embed(ids)
    window = Window(skeleton, range(1, 2), skeleton.calls(TOKENS), none_kept)
    targets = hidden.clone()
    window.advance(targets, {}, 8)
    weights = torch.ones(ids.shape)
    return Setting(skeleton, window, Data(hidden, targets, weights, ids.roll(-1, 1), TRAIN, HELD_OUT))


def observed(setting: Setting, name: str, weights: dict[str, Tensor]) -> Tensor:
    """What a module of the block puts out, by a plain hook on a whole run with some parameters replaced."""
    block = setting.skeleton.blocks[1]
    found: list[Tensor] = []

    def note(module: object, inputs: object, output: object) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    hook = block.get_submodule(name).register_forward_hook(note)
    own = {**setting.window.weights[1], **weights}
    with torch.no_grad():
        setting.skeleton.run(1, own, setting.data.inputs, setting.window.calls[1])
    hook.remove()
    return found[0]


def test_a_window_inside_a_block_puts_out_what_its_ends_do_and_runs_nothing_after_them(setting: Setting) -> None:
    after: list[str] = []
    hook = setting.skeleton.blocks[1].mlp.register_forward_pre_hook(lambda module, inputs: after.append("mlp"))
    ends = ("self_attn.k_proj", "self_attn.q_proj")
    found = Inside(setting.window, ends).forward(setting.data.inputs, {})
    attention = Inside(setting.window, ("self_attn",)).forward(setting.data.inputs, {})
    assert after == []
    whole = Inside(setting.window, ("",)).forward(setting.data.inputs, {})
    hook.remove()
    assert after == ["mlp"]
    assert torch.equal(found, torch.cat([observed(setting, end, {}) for end in ends], -1))
    assert torch.equal(attention, observed(setting, "self_attn", {}))
    assert torch.equal(whole, setting.data.targets)
    assert not any(module._forward_hooks for module in setting.skeleton.blocks[1].modules())


def test_an_end_that_is_never_called_is_refused_by_its_name(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(setting.skeleton.blocks[1]._modules, "unused", torch.nn.ModuleList())
    with pytest.raises(SourceError, match=r"block 2 does not call unused\n.*\n.*stages=\[\]"):
        Inside(setting.window, ("unused",)).forward(setting.data.inputs, {})


def test_fixing_leaves_the_window_as_it_was(setting: Setting) -> None:
    slot = setting.window.slots[0]
    before = {key: weight.clone() for key, weight in setting.window.weights[1].items()}
    fixed = setting.window.fixing({slot: torch.zeros(slot.out_features, slot.in_features)})
    assert fixed.slots == setting.window.slots[1:]
    assert bool((fixed.weights[1][slot.key] == 0).all())
    assert slot in setting.window.slots
    assert all(torch.equal(setting.window.weights[1][key], weight) for key, weight in before.items())


# ---- what is learned when


def test_each_stage_learns_its_slots_with_earlier_ones_hard_and_later_ones_whole(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizers = setting.quantizers()
    before = {slot: [p.detach().clone() for p in q.parameters()] for slot, q in quantizers.items()}
    given: list[tuple[list[str], Tensor, dict[str, Tensor]]] = []
    after: list[dict[Slot, list[Tensor]]] = []

    def spy(
        window: Window, own: dict[Slot, Quantizer], objective: object, head: None, data: Data, *rest: object
    ) -> Fitted:
        names = [slot.module.rpartition(".")[2] for slot in own]
        given.append((names, data.targets, dict(window.weights[1])))
        assert torch.equal(data.inputs, setting.data.inputs)
        assert (data.train, data.held_out) == (TRAIN, HELD_OUT)
        fitted = fit(window, own, objective, head, data, *rest)  # type: ignore[arg-type]
        after.append({slot: [p.detach().clone() for p in q.parameters()] for slot, q in quantizers.items()})
        return fitted

    monkeypatch.setattr(stages, "fit", spy)
    schedule = Schedule(6, BATCH, 2, Recipe(method="gsq").learning_of, 0, choose="last")
    fitted = fit_parts(
        setting.parts(), setting.window, quantizers, OBJECTIVES["mse"](), setting.data, schedule, Stage()
    )
    assert [names for names, *_ in given] == [["q_proj", "k_proj"], ["v_proj", "o_proj"]]
    ends = [["self_attn.q_proj", "self_attn.k_proj"], ["self_attn"]]
    for (_, targets, _), modules in zip(given, ends, strict=True):
        whole = torch.cat([observed(setting, module, {}) for module in modules], -1)
        assert torch.allclose(targets, whole, rtol=0, atol=1e-5)
    hard = {slot.key: q.dequantize() for slot, q in fitted[0].quantized.items()}
    assert len(hard) == 2
    for (_, _, weights), replaced in zip(given, [{}, hard], strict=True):
        for key, weight in setting.window.weights[1].items():
            assert torch.equal(weights[key], replaced.get(key, weight)), key
    for slot, quantizer in quantizers.items():
        leaf = slot.module.rpartition(".")[2]
        turn = 0 if leaf in ("q_proj", "k_proj") else 1 if leaf in ("v_proj", "o_proj") else None
        for index, learned in enumerate(after):
            same = all(torch.equal(a, b) for a, b in zip(before[slot], learned[slot], strict=True))
            assert same == (turn is None or index < turn), (leaf, index)
        if turn is not None:
            assert all(torch.equal(a, b) for a, b in zip(after[turn][slot], quantizer.parameters(), strict=True))
            assert torch.equal(fitted[turn].quantized[slot].codes, quantizer.freeze().codes)


def test_held_out_rows_choose_by_the_stages_own_error(setting: Setting) -> None:
    quantizers = setting.quantizers("flexround")
    schedule = Schedule(30, BATCH, 5, Recipe(method="flexround").learning_of, 0)
    parts, mse = setting.parts(), OBJECTIVES["mse"]()
    fitted = fit_parts(parts, setting.window, quantizers, mse, setting.data, schedule, Stage())
    replaced: dict[str, Tensor] = {}
    for part, found in zip(parts, fitted, strict=True):
        replaced |= {slot.key: q.dequantize() for slot, q in found.quantized.items()}
        errors = [(observed(setting, end, replaced) - observed(setting, end, {}))[TRAIN:].square() for end in part.ends]
        measures = dict(found.course.held_out)
        assert list(measures) == [0, 6, 12, 18, 24, 30]
        assert measures[found.course.kept] == min(measures.values()) < measures[0]
        assert float(torch.cat(errors, -1).mean()) == pytest.approx(measures[found.course.kept], rel=1e-4)
        assert found.tokens == 30 * BATCH * TOKENS


# ---- in a run


def rows(count: int, vocabulary: int = VOCABULARY, seed: int = 0) -> Rows:
    ids = torch.randint(3, vocabulary, (count, TOKENS + 1), generator=torch.Generator().manual_seed(seed))
    return Rows(ids[:, :-1], ids[:, 1:], torch.ones(count, TOKENS))


SHORT = {"bits": 2, "group_size": 16, "symmetric": True, "row_tokens": TOKENS, "rows": TRAIN, "held_out": HELD_OUT}
SHORT |= {"steps": 4, "batch": BATCH, "checks": 2, "scale_dtype": "float32", "device": "cpu"}


class Counting(Watcher):
    """Adds up what a stage advances by."""

    def __init__(self) -> None:
        self.total, self.done = 0.0, 0.0
        self.details: list[str] = []

    def detail(self, sentence: str) -> None:
        self.details.append(sentence)

    @contextmanager
    def stage(self, title: str, total: float) -> Iterator[Stage]:
        counting, self.total = self, total

        class Counted(Stage):
            def advance(self, units: float = 1, detail: str = "") -> None:
                assert units >= -1e-9 * total
                counting.done += units

        yield Counted()


def walked(tmp_path: Path, watcher: Watcher, **changes: object) -> tuple[Skeleton, list[dict[str, object]], RunFolder]:
    skeleton = skeleton_of("llama")
    recipe = Recipe.load(None, **{**SHORT, **changes})
    steps, folder = plan_steps(recipe, len(skeleton), "root"), RunFolder(tmp_path / "run")
    Walk(skeleton, recipe, rows(TRAIN + HELD_OUT), HELD_OUT, folder, none_kept).run(steps, watcher)
    return skeleton, [folder.record(step.key) for step in steps], folder


def test_a_run_counts_the_steps_of_all_stages(tmp_path: Path) -> None:
    watcher, plain = Counting(), Counting()
    _, records, _ = walked(tmp_path / "gsq", watcher, method="gsq", objective="mse")
    walked(tmp_path / "plain", plain, method="gsq", objective="mse", stages=[])
    assert watcher.done == pytest.approx(watcher.total)
    assert plain.done == pytest.approx(plain.total)
    assert watcher.total > 1.2 * plain.total
    places = ["at self_attn.q_proj and self_attn.k_proj", "at self_attn", "by mse"]
    expected = [f"block {block} {place}: held-out mse " for block in (1, 2, 3) for place in places]
    assert [detail[: len(start)] for detail, start in zip(watcher.details, expected, strict=True)] == expected
    for record in records:
        assert [len(stage["losses"]) for stage in record["stages"]] == [4, 4]  # type: ignore[attr-defined,index]
        assert len(record["losses"]) == 4  # type: ignore[arg-type]
        assert record["tokens"] == 3 * 4 * BATCH * TOKENS


def test_a_block_of_which_stages_name_every_slot_has_nothing_left_to_learn(tmp_path: Path) -> None:
    watcher = Counting()
    _, records, _ = walked(tmp_path, watcher, objective="lfq", stages=[{"slots": ["*"], "at": "own"}])
    assert watcher.done == pytest.approx(watcher.total)
    assert all(record["losses"] == [] for record in records)
    assert records[-1]["held_out_kl"] > 0  # type: ignore[operator]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(llama_config(hidden_size=48, head_dim=16, intermediate_size=64, max_position_embeddings=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return save(model, tmp_path_factory.mktemp("model") / "tiny")


FAST = {
    "rounding": {"optimizer": "lion", "rate": 2e-3, "schedule": "cosine", "end": 0.1, "decay": 1.0},
    "scale": {"optimizer": "lion", "rate": 1e-3, "schedule": "cosine", "end": 0.1},
}
"""The published rates are for 1,280 steps."""


@pytest.fixture(scope="module")
def quantized(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., logitwise.Result]:
    out = tmp_path_factory.mktemp("out")

    def run(name: str, **changes: object) -> logitwise.Result:
        recipe = Recipe.load(None, **{**SHORT, "start": "gptq", "rows": 48, "held_out": 16, **changes})
        return logitwise.quantize(folder, out / name, recipe, rows=rows(64, 90), overwrite=True)

    return run


@pytest.mark.parametrize("symmetric", [True, False])
def test_gsq_is_better_than_its_start_on_rows_held_out(
    quantized: Callable[..., logitwise.Result], symmetric: bool
) -> None:
    start = quantized("start", method="gsq", steps=0, symmetric=symmetric)
    result = quantized("gsq", method="gsq", steps=60, batch=8, learning=FAST, symmetric=symmetric)
    assert result.held_out_kl["mse"] < 0.95 * start.held_out_kl["mse"]
    assert result.held_out_kl["lfq"] < 0.95 * start.held_out_kl["mse"]


def test_the_same_seed_gives_the_same_bytes_and_the_users_random_numbers_are_left_alone(
    quantized: Callable[..., logitwise.Result],
) -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    asked = {"method": "gsq", "learning": FAST, "start": "searched", "objective": "mse"}
    first = quantized("first", **asked)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(8)
    second = quantized("second", **asked)
    other = quantized("other", **asked, seed=1)
    files = [(result.out / "model.safetensors").read_bytes() for result in (first, second, other)]
    assert files[0] == files[1]
    assert files[0] != files[2]
