"""Fused kernels: one pass over the coordinates in place of many."""
