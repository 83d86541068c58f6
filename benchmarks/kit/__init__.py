"""What the scripts share: the model and its data, running the platform, step logs, tables."""
