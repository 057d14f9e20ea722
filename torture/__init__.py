"""`make torture`: the long proof that nothing is lost. Every `part_*.py` in this folder is found and run by itself."""
