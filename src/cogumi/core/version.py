"""The version of the package; must equal the one in `pyproject.toml`."""

__version__ = "0.1.0"
