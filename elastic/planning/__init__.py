"""What a recipe will cost, in seconds and bytes, and which mesh to take."""
