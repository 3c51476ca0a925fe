"""Evaluation: build reports, benchmarks, and suites of measurements."""
