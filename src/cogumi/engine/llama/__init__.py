"""The llama.cpp engine: continuous batching, one context per adapter, speculative decoding."""
