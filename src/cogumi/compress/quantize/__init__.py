"""Quantization: sensitivity of linear layers, AWQ and GPTQ."""
