"""Grading of outputs against references: graders, and the sandbox that runs generated code."""
