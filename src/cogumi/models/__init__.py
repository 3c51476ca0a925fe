"""Models as Hugging Face folders: tokenizer, weights, adapters, heads. This is where torch lives."""
