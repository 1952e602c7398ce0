"""Judging models that are not written: transformers' modules without weights, filled layer by layer."""
