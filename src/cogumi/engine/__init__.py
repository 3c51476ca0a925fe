"""Engines turn a request into tokens: the protocol, llama.cpp, torch, and remote servers.

Imports nothing of the build chain.
"""
