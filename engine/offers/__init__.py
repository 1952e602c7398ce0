"""What a checkpoint offers for each tensor name: expressions over what it stores.

Formats, layouts and ties are pure mappings from offers to offers, applied one after the other (`formats.py`).
"""
