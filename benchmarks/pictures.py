"""The pictures of docs/.

python benchmarks/pictures.py --out docs/pictures --results docs/results/lfq_variants_w2_h100.json
    --own-text docs/results/own_text_h100.json --methods docs/results/methods_h100.json
    --growth docs/results/growth_h100.json
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "logitwise"  # the same picture, the same bytes
import matplotlib.pyplot as plt  # noqa: E402

NAMES = {
    "rtn": "round to\nnearest",
    "mse": "MSE",
    "logit_mse": "MSE on\nlogits",
    "hard_labels": "hard\nlabels",
    "lfq": "LFQ",
    "lfq K=12 from mse": "LFQ of all\nblocks",
    "usual": "the same, on\n3.3M tokens of\nits own text",
}
PANELS = {  # of a factor: what it is called, what is shown of a value, how that is written
    "rows_last": ("tokens of its own text", lambda rows: rows * 199, lambda x: f"{x / 1e6:.2g}M"),  # 199 of 256 count
    "final_blocks": ("blocks learned together", lambda blocks: blocks, lambda x: f"{x:.0f}"),
    "rate": ("rate of the rounding", lambda rate: rate, lambda x: f"{x:g}"),
    "steps_last": ("steps of all blocks together", lambda steps: steps, lambda x: f"{x:,.0f}"),
    "steps": ("steps of each MSE fit before", lambda steps: steps, lambda x: f"{x:,.0f}"),
}
METHODS = {
    "flexround": "FlexRound",
    "signround": "SignRound",
    "lrq": "LRQ",
    "block_ap": "Block-AP",
    "lwc": "OmniQuant's\nclipping",
    "gsq": "GSQ, symmetric",
}
GRIDS = {"w2g64": "W2 g64", "w3ch": "W3 per channel", "w4ch": "W4 per channel"}
GROWN = {"blocks": "blocks", "rows": "rows", "hidden": "hidden size", "vocabulary": "tokens of the vocabulary"}
PARTS = {"steps": "learning", "checking the model, proving the replay": "reading, checking, writing"}
PARTS |= dict.fromkeys(("reading blocks", "keeping fits", "writing, reading back"), "reading, checking, writing")
REST = "the rest"
PLAIN, POLISHED, INK = "#9aa5b1", "#1f77b4", "#30363d"


def main() -> None:
    """Draws them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, nargs="+", required=True)
    parser.add_argument("--own-text", type=Path, required=True)
    parser.add_argument("--methods", type=Path, required=True)
    parser.add_argument("--growth", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--grid", default="w2g64")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    results = [row for file in given.results for row in json.loads(file.read_text())["results"]]
    own = json.loads(given.own_text.read_text())["results"]
    variants(
        results + [row for row in own if row["variant"].startswith("usual")], given.grid, given.out / "variants.svg"
    )
    factors(own, given.out / "factors.svg")
    methods(json.loads(given.methods.read_text())["results"], given.out / "methods.svg")
    growth(json.loads(given.growth.read_text())["results"], given.out / "growth.svg")
    path(given.out / "lfq.svg")


def variants(results: list[dict], grid: str, out: Path) -> None:
    """KL by fit, with and without the polish; dots are seeds."""
    figure, axes = plt.subplots(figsize=(8.5, 3.4))
    for index, fit in enumerate(NAMES):
        for shift, end, colour in ((-0.2, "", PLAIN), (0.2, "+polish", POLISHED)):
            found = [
                row["figures"]["development"]["kl"]["mean"]
                for row in results
                if row["grid"] == grid and row["variant"] == fit + end
            ]
            if found:
                mean = float(np.mean(found))
                axes.bar(index + shift, mean, 0.38, color=colour)
                axes.text(index + shift, mean + 0.012, f"{mean:.3f}", ha="center", fontsize=8, color=INK)
                axes.plot([index + shift] * len(found), found, ".", color=INK, markersize=3)
    axes.set_xticks(range(len(NAMES)), list(NAMES.values()), fontsize=8)
    axes.set_ylabel("KL to full precision,\nnats a token")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in (PLAIN, POLISHED)]
    axes.legend(handles, ["last block fitted so", "then all scales polished"], frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, out)


def factors(results: list[dict], out: Path) -> None:
    """KL where one factor is other than usual; beside that of MSE in each block."""
    from own_text import USUAL

    usual = {"rate": USUAL["learning_last"]["rounding"]["rate"]} | USUAL
    kl = {row["variant"]: row["figures"]["development"]["kl"]["mean"] for row in results if row["seed"] == 0}
    figure, every = plt.subplots(1, len(PANELS), figsize=(13, 2.8), sharey=True)
    for axes, (key, (title, shown, written)) in zip(every, PANELS.items(), strict=True):
        points = {float(name.split("=")[1]): value for name, value in kl.items() if is_value(name, key)}
        points = dict(sorted((points | {float(usual[key]): kl["usual"]}).items()))
        places = [shown(value) for value in points]
        axes.plot(places, list(points.values()), "o-", color=POLISHED, markersize=4)
        axes.plot([shown(usual[key])], [kl["usual"]], "o", color=INK, markersize=6)
        axes.set(xscale="log", ylim=(0, 0.25))
        axes.set_xlabel(title, fontsize=9)
        axes.set_xticks(places, [written(place) for place in places], fontsize=8)
        axes.set_xticks([], minor=True)
        axes.spines[["top", "right"]].set_visible(False)
        for name, text in (("mse", "each block by MSE, .1M tokens"), ("mse, all text", "by MSE, 3.3M tokens")):
            axes.axhline(kl[name], color=PLAIN, linestyle=":", linewidth=1)
            axes.text(1, kl[name], text, transform=axes.get_yaxis_transform(), ha="right", va="bottom", fontsize=7)
    every[0].set_ylabel("KL to full precision,\nnats a token")
    save(figure, out)


def is_value(name: str, key: str) -> bool:
    """Whether a variant is other than usual in this one factor alone."""
    return name.startswith(f"{key}=") and name.removeprefix(f"{key}=").replace(".", "").isdecimal()


def methods(results: list[dict], out: Path) -> None:
    """KL against the steps of a block, for each method by MSE (dotted) and by LFQ; means over seeds."""
    every_step = sorted({steps_of(row) for row in results})
    figure, every = plt.subplots(1, len(GRIDS), figsize=(11, 3.2))
    for axes, (grid, title) in zip(every, GRIDS.items(), strict=True):
        for index, (method, name) in enumerate(METHODS.items()):
            for fit, line in (("mse", ":"), ("lfq from mse", "-")):
                kl: dict[int, list[float]] = defaultdict(list)
                for row in results:
                    if (row["grid"], method_of(row), row["variant"].partition(": ")[2]) == (grid, method, fit):
                        kl[steps_of(row)].append(row["figures"]["development"]["kl"]["mean"])
                means = [float(np.mean(kl[steps])) for steps in sorted(kl)]
                axes.plot(
                    sorted(kl), means, f"o{line}", color=f"C{index}", markersize=3, label=name if line == "-" else None
                )
        axes.set(xscale="log", yscale="log", title=title)
        axes.set_xlabel("steps a block", fontsize=9)
        axes.set_xticks(every_step, [f"{steps:,}" for steps in every_step])
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(labelsize=8, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("KL to full precision,\nnats a token")
    every[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, out)


def growth(results: list[dict], out: Path) -> None:
    """The time of a run and its parts, against each thing that was changed beside one middle shape."""
    middle = results[0]
    figure, every = plt.subplots(1, len(GROWN), figsize=(11, 2.8), sharey=True)
    for axes, (name, title) in zip(every, GROWN.items(), strict=True):
        runs = [middle, *(run for run in results[1:] if run["varies"] == name)]
        runs.sort(key=lambda run: run["at"][name])
        bottom = np.zeros(len(runs))
        for kind, colour in (("learning", POLISHED), ("reading, checking, writing", PLAIN), (REST, "#d7dde3")):
            parts = [sum(s for part, s in run["parts"].items() if PARTS.get(part, REST) == kind) for run in runs]
            axes.bar(range(len(runs)), parts, bottom=bottom, width=0.6, color=colour, label=kind)
            bottom += parts
        axes.set_xticks(range(len(runs)), [f"{run['at'][name]:,}" for run in runs])
        axes.set_xlabel(title, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].set_ylabel("seconds of a run")
    every[-1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, out)


def settings_of(row: dict) -> dict[str, str]:
    """What was asked for beside the variant."""
    return dict(each.split("=", 1) for each in row["settings"])


def steps_of(row: dict) -> int:
    """Steps of a block's fit: 300, where the settings do not say otherwise."""
    return int(settings_of(row).get("steps", 300))


def method_of(row: dict) -> str | None:
    """By which method a row of the methods' table is, with the rates of that table; none where the rates are others."""
    each = row["variant"].partition(": ")[0]
    if each.startswith("method="):
        return each.removeprefix("method=")
    return "gsq" if settings_of(row).get("method") == "gsq" else None


def path(out: Path) -> None:
    """Who reads what, and where the gradient goes."""
    figure, axes = plt.subplots(figsize=(8, 2.8))
    axes.set(xlim=(0, 100), ylim=(0, 36))
    axes.axis("off")
    boxes = {
        24: ("teacher", "full-precision\nblocks", "last block", PLAIN),
        6: ("student", "quantized\nblocks", "last block,\nlearned", POLISHED),
    }
    for y, (side, before, last, colour) in boxes.items():
        axes.text(0, y + 3, side, va="center", color=INK)
        for x, text, fill in ((12, before, PLAIN), (33, last, colour), (54, "final norm,\nhead (frozen)", PLAIN)):
            axes.add_patch(plt.Rectangle((x, y - 1), 16, 8, facecolor=fill, alpha=0.35, edgecolor=INK, linewidth=0.8))
            axes.text(x + 8, y + 3, text, ha="center", va="center", fontsize=9, color=INK)
        for x in (28, 49, 70):
            axes.annotate("", (x + 5, y + 3), (x, y + 3), arrowprops={"arrowstyle": "->", "color": INK})
        axes.text(77, y + 3, "p" if side == "teacher" else "q", va="center", fontsize=12, style="italic", color=INK)
        axes.annotate("", (85, 18), (79, y + 3), arrowprops={"arrowstyle": "->", "color": INK})
    axes.text(86, 18, "$-\\sum p\\,\\log q$", va="center", fontsize=11, color=INK)
    axes.annotate(
        "", (41, 3.5), (92, 15), arrowprops={"arrowstyle": "->", "color": POLISHED, "connectionstyle": "arc3,rad=-0.35"}
    )
    axes.text(82, 3.5, "gradient q - p", color=POLISHED, fontsize=9)
    save(figure, out)


def save(figure: plt.Figure, out: Path) -> None:
    """Without the date, so that the same picture has the same bytes."""
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None}, transparent=False)
    plt.close(figure)


if __name__ == "__main__":
    main()
