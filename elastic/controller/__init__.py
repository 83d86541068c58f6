"""The process that decides who trains: a pure state machine, what carries out its decisions, and what a run writes about itself."""
