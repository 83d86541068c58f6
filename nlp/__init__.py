"""Language models, their data, metrics and recipes."""
