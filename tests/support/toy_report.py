"""The toy stage as one that reports."""

from support.toy import INPUTS, KIND, OPTIONAL, VERSION, Config, run

__all__ = ["INPUTS", "KIND", "OPTIONAL", "REPORTS", "VERSION", "Config", "run"]
REPORTS = True
