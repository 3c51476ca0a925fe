"""A smaller vocabulary."""
