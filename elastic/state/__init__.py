"""The training state in flat buffers: who holds which part of it, and how it moves between members."""
