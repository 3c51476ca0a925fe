"""Graded answers of models: base responses, solution paths, tier answers; later also teacher models."""
