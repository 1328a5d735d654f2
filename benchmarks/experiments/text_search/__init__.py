"""Search for recurrent cells that share weights: what sampled language models forget, with and without the penalty."""
