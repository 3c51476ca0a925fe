"""Synthetic dialogues with satisfied or dissatisfied follow-ups."""
