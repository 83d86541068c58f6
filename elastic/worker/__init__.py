"""The process that trains: built once, it takes part in one generation after another.

    actor, worker      the Ray actor, and its life from generation to generation
    loop               a step from beginning to end; context: one generation as its steps see it; training: what a step
    is made of
    gradients          a member's own shards; vote: what commits a step; sharded_step: what differs where each owns a
    part
    embedding          the tables of a step: rows looked up at their owners, sums of slopes, the commit; bucket_moves:
    who gets which
    heal               how a member comes by the state; saver, table_saver: its share of a checkpoint; outbox: its way to the
    controller
    rehearsal          the run through the model before the first step, and what it refuses; overwrite_watch: what it
    refuses later
    lr_schedule        the learning rate; evaluation; loop_control: what other threads may ask
"""
