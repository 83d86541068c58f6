"""Models of images, their data, metrics and recipes.

    resnet, vit     models, named for themselves
    data            the data door: images, normalised and varied as they are fed
    images, store   labelled images as files hold them; decoded, in mapped files, and their classes
    augment         crops, mirror images, mixtures
    metrics         what a classifier starts from, and is trained and judged by
    recipes/        what `elastic train vision/NAME` finds
"""
