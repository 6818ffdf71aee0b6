"""Comparisons: who is compared, on what, and what came out."""
