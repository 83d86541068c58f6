"""The process that decides who trains: a pure state machine, what carries out its decisions, and what a run writes about itself.

    actor, session     the Ray actor, and its life: a run begun, or taken over from a controller that fell
    controller         what workers, fleet and user report becomes an event; what the state machine orders is carried
    out
    membership         who is in the group (pure), with events in and orders out; recovery: which state counts, who
    heals whom; bucket_holders: who holds which rows of the tables
    policy             how many workers, on which mesh; when to start one again; when to give up
    failure_detector   who counts as dead or hung
    run_log, journal   events.jsonl and metrics.jsonl, each step once; what a successor needs
    checkpoints        the one who commits them, chooses among them and clears away
    fleet              who starts and ends workers: ray_fleet on Ray, thread_fleet in one process
"""
