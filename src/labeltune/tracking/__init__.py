"""Experiment trackers: what a training shows in SwanLab, Weights & Biases or TensorBoard. Start reading in `base.py`."""
