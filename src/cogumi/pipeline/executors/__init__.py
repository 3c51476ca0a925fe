"""Executors, one per module."""
