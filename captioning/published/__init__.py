"""Captions that others have published, joined with the pictures of a corpus."""
