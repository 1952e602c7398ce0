"""Lazy tensor expressions over stored bytes, and the statistics that they can gather."""
