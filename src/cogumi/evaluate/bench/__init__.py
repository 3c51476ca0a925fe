"""`cogumi bench`: every feature's speed against the same without it, and against what the machine allows (SPEC H4)."""
