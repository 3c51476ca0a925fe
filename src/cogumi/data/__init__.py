"""Where examples come from: the embedded world, or a user's own files."""
