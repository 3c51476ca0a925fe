"""`cogumi bench`: speed with each feature against without it, and against the machine's limit (SPEC H4)."""
