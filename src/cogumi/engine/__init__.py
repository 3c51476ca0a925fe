"""Engines turn a request into tokens: the protocol, llama.cpp, torch, and remote servers.

Imports no package of the build chain (only `engine.torch` uses `models`).
"""
