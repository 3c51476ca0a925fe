"""A thin typed wrapper of llama.cpp's C interface: the only package that imports llama_cpp.

Calls that would abort the process are rejected beforehand.
"""
