"""Searching for a merge: candidates that are recipes with numbers put in, judged, noted, and improved upon."""
