"""Recommenders: the models, their data and their figures.

    dlrm            the models, by their architecture
    data            the data door: tables of labels, categories and numbers
    encode          columns of tables as numbers
    metrics         figures that are no means over rows
    recipes/        what `elastic train recommender/NAME` finds
"""
