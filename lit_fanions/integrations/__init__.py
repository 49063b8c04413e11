"""A few lines each for training loops other than Lightning's Trainer and plain torch."""
