"""Small local chat systems that know how sure they are: draft, base and modifiers behind one calibrated cascade."""

from cogumi.core.version import __version__

__all__ = ["__version__"]
