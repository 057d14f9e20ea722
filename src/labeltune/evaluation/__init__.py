"""Figures of predictions with their intervals (metrics, spans), comparisons of two models, and the pages that show them."""
