"""Weights prepared for few bits: sensitivity, AWQ and GPTQ."""
