"""Search for convolution cells that share weights: what sampled classifiers forget, with and without the penalty."""
