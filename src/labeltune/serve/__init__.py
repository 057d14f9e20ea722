"""Runs behind HTTP: batched by one worker, with the answers of the offline predictor, and a page to try them."""
