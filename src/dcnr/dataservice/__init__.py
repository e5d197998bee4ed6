"""Datasets and state objects, checked and served against short-lived tokens."""
