"""The run side's brain: one request through draft, base, gate and modifiers."""
