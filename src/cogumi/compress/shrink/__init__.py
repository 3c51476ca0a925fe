"""Fewer layers, heads, neurons and channels."""
