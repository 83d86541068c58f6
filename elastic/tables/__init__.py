"""Embedding tables whose rows lie on workers: the protocol of a row store, buckets and who owns them, starting rows, evictions.

    spec        what a table is, from the recipe alone
    bags        what a shard looks up, and the sums of slopes that come back
    rows        rows on their way: to a checkpoint or another worker; their digests
    placing     what the data's facts say of tables
    features    what a run's tables are; of_recipe makes them of recipe and facts
    row_store   the protocol of a store, found by name
    buckets     ids to buckets, buckets to owners; held: the rows of one worker
    wire        arrays between members
    starts      the row that an id starts from
    untrained   a batch with the rows that its ids start from; rehearsal: the kernels' first calls
    eviction    which ids a commit forgets; removed: which have gone since a checkpoint
"""
