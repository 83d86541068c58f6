"""Collective groups: one contract (`group`), several transports, and the reduction in canonical order on top of them.

    group      the contract
    reduction  the canonical tree over logical shards; the sum along it across a group
    member     what all implementations share
    solo       a group of one
    local      threads of one process, for tests
    kv_store   where processes meet
    gloo       processes over TCP
    shared     processes of one node over shared memory
    nccl       GPUs
"""
