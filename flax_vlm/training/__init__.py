"""Training: what is minimised, the step, the data, and the loop around them."""
