"""Files of a run, atomic writes, locks, progress, and what is read from strangers."""
