"""Reports: what a study found, in words, tables and pictures."""
