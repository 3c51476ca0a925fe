"""GGUF model files: tensors, quantization types, file sizes, and the importance matrix."""
