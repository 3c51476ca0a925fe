"""A thin typed wrap of llama.cpp's C interface: the only package that imports llama_cpp.

What would kill the process is refused before the call.
"""
