"""Sources of examples, their storage, and the split into disjoint sets."""
