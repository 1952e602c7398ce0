"""Bytes by range from where they are stored, and positioned writes to where they shall be."""
