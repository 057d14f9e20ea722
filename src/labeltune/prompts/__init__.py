"""Conversations -> token ids, with the places of text and answer, inside a length budget."""
