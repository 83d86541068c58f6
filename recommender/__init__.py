"""Recommenders: the models, their data and their figures.

    dlrm            the models, by their architecture
    data            the data door: tables of labels, categories and numbers
    encode          columns of tables as numbers
    placing         which columns are dense embeddings, and which lie in tables on workers
    click_log       a log of clicks that is made, for want of a download
    metrics         figures that are no means over rows
    row_store       rows of embedding tables on compiled kernels; row_sums, row_kernels, index_kernels, slabs: its parts
    reference_rows  the same in plain NumPy, the oracle
    recipes/        what `elastic train recommender/NAME` finds
"""
