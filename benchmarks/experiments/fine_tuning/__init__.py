"""Incremental fine-tuning: small update sets of known or of new classes, with and without the penalty."""
