"""Training on transformers' Trainer. Knows no tracker: callbacks come from outside."""
