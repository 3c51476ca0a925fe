"""What a recipe will take and what comes of it, before anything is built (SPEC D1)."""
