"""A sequence of tasks, each the same digits with their pixels in another order: what the Fisher's weights buy."""
