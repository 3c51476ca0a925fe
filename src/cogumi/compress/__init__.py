"""Model compression: vocabulary trimming, pruning, shrinking, quantization, GGUF export and packing."""

import os

os.environ.setdefault("LLM_COMPRESSOR_LOG_LEVEL", "CRITICAL")
"""llm-compressor reads this when it is imported; by default it logs every weight that it modifies."""
