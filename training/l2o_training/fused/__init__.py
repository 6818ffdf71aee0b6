"""Compiled cells for meta-training on CPUs: forward and gradient."""
