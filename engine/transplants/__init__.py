"""Rows of another vocabulary: how a model's embedding gets rows for tokens that it never had.

One file an approximation, a pure function of arrays; `transplanted.py` has the expression that streams.
"""
