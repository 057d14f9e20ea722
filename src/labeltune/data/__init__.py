"""Rows: reading files, finding their faults, and converting them."""
