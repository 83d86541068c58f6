"""One folder per framework, found by name at run time; the same file has the same role in each, and common.py is what they share.

    backend       `framework`, the door (`elastic.model.backend.Framework`), and a Backend over the platform's flat
    buffers
    ops           the kernels that models are written in (`elastic.model.ops.Ops`)
    optimizer     an update of flat buffers, block by block
    arrays        what passes between NumPy's memory and the framework's
    collectives   what a split model's kernels exchange, forward and backward
    stages        pieces of a model between their forward and their backward pass
    tracing       graphs: what is recorded or traced once, and cut where workers meet
    routing       kernels that choose
    adapter       a user's own model as the platform sees it
"""
