"""Engines: what turns a request into tokens. Imports nothing of the build chain."""
