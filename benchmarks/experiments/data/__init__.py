"""Data that the experiments learn from: images of digits or things, and text."""
