"""The suites of `cogumi eval --suite`, on bundles and public data (see `cogumi.evaluate.suite`)."""
