"""logitwise: low-bit quantization of language models, fitted to the token probabilities (LFQ)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from logitwise.comparison import Compared, compare
    from logitwise.convert import export
    from logitwise.errors import LogitwiseError
    from logitwise.evaluation import evaluate, inspect
    from logitwise.pipeline import Result, quantize
    from logitwise.planning import Plan, plan
    from logitwise.recipe import Recipe
    from logitwise.refitting import Refitted, refit

__all__ = [
    "Compared",
    "LogitwiseError",
    "Plan",
    "Recipe",
    "Refitted",
    "Result",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "plan",
    "quantize",
    "refit",
]

_PLACES = {
    "Compared": "comparison",
    "LogitwiseError": "errors",
    "Plan": "planning",
    "Recipe": "recipe",
    "Refitted": "refitting",
    "Result": "pipeline",
    "compare": "comparison",
    "evaluate": "evaluation",
    "export": "convert",
    "inspect": "evaluation",
    "plan": "planning",
    "quantize": "pipeline",
    "refit": "refitting",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when first asked for: torch and transformers take seconds, `--help` should not."""
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"logitwise.{_PLACES[name]}"), name)
    globals()[name] = found
    return found
