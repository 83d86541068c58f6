"""Recommenders: the models, their data and their figures.

    dlrm            the models, by their architecture
    data            the data door: tables of labels, categories and numbers
    encode          columns of tables as numbers
    metrics         figures that are no means over rows
    row_store       rows of embedding tables on compiled kernels; row_sums, row_kernels, index_kernels, slabs: its
    parts; reference_rows: the oracle recipes/        what `elastic train recommender/NAME` finds
"""
