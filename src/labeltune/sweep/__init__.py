"""Sweeps: many short runs over a few config keys, compared on the validation rows."""
