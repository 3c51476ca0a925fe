"""The toy stage with `REPORTS = True`."""

from support.toy import INPUTS, KIND, OPTIONAL, VERSION, Config, run

__all__ = ["INPUTS", "KIND", "OPTIONAL", "REPORTS", "VERSION", "Config", "run"]
REPORTS = True
