"""Speculative decoding: sources of drafts, verification, and the choice of the draft length."""
