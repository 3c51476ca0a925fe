"""Readers of a user's own files, one module per format."""
