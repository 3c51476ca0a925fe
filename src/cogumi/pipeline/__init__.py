"""Recipes, their planning, and the build."""
