"""Pruning: the least important weights are set to zero."""
