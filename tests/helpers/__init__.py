"""What several tests need. Tests import from here and from labeltune, never from each other."""
