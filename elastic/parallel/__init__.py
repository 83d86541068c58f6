"""How work is spread over a mesh of workers, what it costs and what it needs; pipelines as data, proven, timed and run."""
