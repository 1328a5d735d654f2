"""EWC beside WPL: one model on new data, or a new model on the same data; and the range of strengths that work."""
