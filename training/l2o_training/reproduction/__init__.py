"""The papers' experiments, from data to a page of numbers: plans, runs, statistics, pictures."""
