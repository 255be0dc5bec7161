"""Exact rewrites: the same function with other weights, which lose less when they are rounded."""

from logitwise.rewrites.folds import Fold, find_folds
from logitwise.rewrites.scales import READ_INPUTS, takes
from logitwise.rewrites.walk import prove_same, rewrite

__all__ = ["READ_INPUTS", "Fold", "find_folds", "prove_same", "rewrite", "takes"]
