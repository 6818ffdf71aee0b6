"""Meta-training: what is unrolled, what is minimised, in which order, and how a run is kept."""
