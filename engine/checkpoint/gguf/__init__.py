"""Files of llama.cpp (GGUF): their headers read and written, and what they call tensors, settings and tokens.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
