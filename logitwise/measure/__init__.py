"""Metrics: what a quantized model's token probabilities are worth."""
