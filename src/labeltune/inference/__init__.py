"""Texts -> predictions."""
