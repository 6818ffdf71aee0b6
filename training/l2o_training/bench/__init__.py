"""Benchmark: what a step of an optimizer costs, beside others in the same process."""
