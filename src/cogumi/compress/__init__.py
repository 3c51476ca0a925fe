"""Making models small and shippable: export to GGUF, quantization, packing."""
