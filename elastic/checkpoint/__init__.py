"""Checkpoints: whole or absent. Part files first, the manifest last; every byte is hashed, nothing is ever executed.

Nothing is imported here: the layout of a state needs the shares of a checkpoint, on machines that have torch and NumPy
alone.
"""
