"""Recommenders: the models, their data and their figures."""
