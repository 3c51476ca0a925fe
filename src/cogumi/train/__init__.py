"""Training: one loop, losses passed in as functions, one stage per kind of model."""
