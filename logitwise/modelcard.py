"""The README.md of a checkpoint: how it was made and how to load it."""

from typing import Any

from logitwise.formats import FORMATS


def model_card(report: dict[str, Any]) -> str:
    """A model card of a run's report."""
    recipe, name = report["recipe"], report["model"]["name"]
    form, grids = FORMATS[report["choices"]["format"]["value"]], sorted(report["grids"])
    title = ", ".join(grids[0].split(", ")[:2]) if len(grids) == 1 else f"{report['bits_per_weight']:.2f} bits a weight"
    several = "; ".join(f"{report['grids'][grid]} layers to {grid}" for grid in grids)
    each = f"quantized to {grids[0]}" if len(grids) == 1 else f"quantized ({several})"
    kl = "".join(f"| {objective} | {value:.4f} |\n" for objective, value in report["held_out_kl"].items())
    measured = "\nKL to the original on held-out rows, nats a token:\n\n| after | KL |\n|---|---|\n" + kl if kl else ""
    polished = ", and all scales, norms and biases then tuned together" if (report["polish"] or {}).get("kept") else ""
    rewrites = " and ".join(recipe["rewrites"])
    rewritten = (
        f"\nIts weights were rewritten first, the full-precision model unchanged, by {rewrites}." if rewrites else ""
    )
    form = FORMATS[report["choices"]["format"]["value"]]
    base = f"base_model: {name}\n" if name.count("/") == 1 else ""
    return f"""---
{base}library_name: {form.library}
tags: [logitwise, quantized]
---

# {name}, {title}

The linear layers of {name} {each}, by
logitwise {report["versions"]["logitwise"]} with {recipe["method"]}.
The final blocks were fitted by {report["fitted_by"]}{polished}.{rewritten}
{report["bits_per_weight"]:.2f} bits a quantized weight, {report["size_bytes"] / 1e6:.0f} MB in all.
{measured}
{report["loading"][0].upper()}{report["loading"][1:]}. With the path of this folder, or its name on the hub:

```python
{form.loading(".")}
```

`report.html` shows how the run went; `logitwise.json` holds the recipe, every automatic choice with its reason,
versions, losses and what became of each tensor.
"""
