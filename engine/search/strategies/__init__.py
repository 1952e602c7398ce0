"""Strategies: generators that yield a generation of candidates and are sent what became of them.

Nothing else is known to them, so a search goes on by making its strategy anew and sending it what was noted.
"""
