"""Vocabularies: what a tokenizer's files say, the vocabulary that several make, and whose row each of its tokens is."""

from mergemill.engine.tokens.reading import AddedToken, Vocabulary, read_vocabulary_of, spell_bytes

__all__ = ["AddedToken", "Vocabulary", "read_vocabulary_of", "spell_bytes"]
