"""Where examples come from, how they are stored, and how they are divided."""
