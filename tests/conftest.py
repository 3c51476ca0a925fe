"""What is measured once per machine is measured once per test session here, and leaves nothing behind."""

import os
import tempfile

os.environ["COGUMI_CACHE"] = tempfile.mkdtemp(prefix="cogumi-cache-")
