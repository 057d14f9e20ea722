"""Files that `labeltune init` writes."""
