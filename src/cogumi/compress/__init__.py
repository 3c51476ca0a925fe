"""Making models small and shippable: export to GGUF, quantization, packing."""

import os

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
"""Read when llm-compressor is imported, which by default tells the terminal of every weight it touches."""
