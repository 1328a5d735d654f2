"""A language model fine-tuned with LoRA in a row of domains: what the Fisher's weights buy there."""
