"""``pgl ablate``: what the priors, and options beyond the paper, are worth."""
