"""The laboratory, run from a checkout: the paper's results and the timings that are quoted."""
