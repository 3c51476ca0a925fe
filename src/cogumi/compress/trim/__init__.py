"""Vocabulary trimming: a tokenizer and a model with fewer tokens."""
