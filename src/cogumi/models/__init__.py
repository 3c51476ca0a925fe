"""Models as Hugging Face folders, in torch: tokenizers, weights, adapters, heads."""
