"""Recipes, their plan, and the build that runs them."""
