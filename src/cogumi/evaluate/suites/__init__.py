"""The suites of `cogumi eval --suite` that judge bundles and public data (see `cogumi.evaluate.suite`)."""
