"""Executors, one per module: where the steps of a recipe run."""
