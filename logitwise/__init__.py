"""logitwise: low-bit quantization of language models, fitted to the token probabilities (LFQ)."""

from logitwise.errors import LogitwiseError
from logitwise.pipeline import Result, quantize
from logitwise.recipe import Recipe

__all__ = ["LogitwiseError", "Recipe", "Result", "quantize"]
