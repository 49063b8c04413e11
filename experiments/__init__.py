"""The laboratory, run from a checkout: the paper's results, timings, and what a GPU can tell."""
