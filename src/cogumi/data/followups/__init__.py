"""Synthetic dialogues with a contented or a dissatisfied follow-up."""
