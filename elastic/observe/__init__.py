"""What a run writes about itself: events and metrics as JSON lines, the summary, the report, the live line, and their check."""
