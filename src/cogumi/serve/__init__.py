"""An OpenAI-compatible HTTP server over any cascade. Imports nothing of the build chain."""
