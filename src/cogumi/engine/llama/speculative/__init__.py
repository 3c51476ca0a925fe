"""Speculative decoding: where drafts come from, what is accepted, and when drafting pays."""
