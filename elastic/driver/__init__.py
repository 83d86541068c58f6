"""The user's process: it starts a run, follows it to its end, and puts checkpoints to use."""
