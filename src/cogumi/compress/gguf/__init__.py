"""Model files: what GGUF keeps of a model, in which types, how large, and how faithfully."""
