"""Small local chat systems that know how sure they are: draft, base and modifiers behind one calibrated cascade."""

__version__ = "0.1.0"
