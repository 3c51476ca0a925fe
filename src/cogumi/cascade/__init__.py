"""One request through draft, base, gates, modifiers and memory."""
