"""Wrappers: optimizers around another optimizer."""
