"""Language models, their data, metrics and recipes.

    gpt, bert       models, named for themselves; experts: a mixture of them in place of a layer's MLP
    data            the data door: windows of tokens
    encode          text as token ids, by characters, bytes or byte pairs
    augment         tokens that are hidden for a model to guess
    metrics         what a language model is trained and judged by
    hugging_face    an export
    recipes/        what `elastic train nlp/NAME` finds
"""
