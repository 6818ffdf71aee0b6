"""Evaluation: suites of tasks, baselines, tables and plots."""
