"""Cost and results of a recipe, estimated before anything is built (SPEC D1)."""
