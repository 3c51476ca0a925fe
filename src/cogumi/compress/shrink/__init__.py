"""Structured pruning: fewer layers, heads, neurons and channels."""
