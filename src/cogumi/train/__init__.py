"""Training: a common loop, losses as functions, and one stage per kind of model."""
