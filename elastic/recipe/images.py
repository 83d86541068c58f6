"""Labelled images: the keys of `[data]` that only image models read, and what must hold between them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, FiniteFloat

from elastic.errors import RecipeError
from elastic.recipe.fields import refuse_given, shown
from elastic.recipe.tables import Labelled

FORMATS = ("idx", "imagefolder")
IMAGE_TABLES = ("parquet", "arrow")


class Pictured(Labelled):
    """The part of `[data]` that image models read. Crops, mirror images and mixtures are for training alone."""

    image: str = Field("", description="a column's name")
    image_size: int = Field(0, ge=0, description="a whole number of at least 0 (pixels of each side; 0: all images "
                                                 "have one size already)")
    channels: Literal[0, 1, 3] = Field(0, description="1 (all images are made grey), 3 (all in colour) or 0 (all have "
                                                      "the same already)")
    crop: int = Field(0, ge=0, description="a whole number of at least 0 (pixels by which an image is moved at most)")
    flip: bool = Field(False, description="true or false")
    mixup: FiniteFloat = Field(0.0, ge=0, description="a number of at least 0 (alpha of the Beta distribution; 0 is "
                                                      "none)")
    skip_bad: bool = Field(False, description="true or false: whether damaged images and those of another size are "
                                              "skipped")


def check_pictured(recipe: Any) -> None:
    """`RecipeError` in one sentence."""
    data, kind = recipe.data, recipe.model.kind
    if not kind.startswith("vision."):
        if data.format in FORMATS:
            raise RecipeError(f"data.format = {shown(data.format)} holds images, which model.kind = {shown(kind)} does "
                              "not read; write "
                              'model.kind = "vision.resnet" or "vision.vit", or another format.')
        refuse_given("data", data, Pictured.__annotations__,
                     'for image models (model.kind = "vision.resnet" or "vision.vit")')
        return
    if data.format not in (*FORMATS, *IMAGE_TABLES):
        known = ", ".join(map(shown, (*FORMATS, *IMAGE_TABLES)))
        raise RecipeError(f"data.format = {shown(data.format)} does not feed model.kind = {shown(kind)}, which reads "
                          f"images; write one of {known}.")
    for key in ("image_size", "channels"):
        if getattr(data, key) and data.format == "idx":
            raise RecipeError(f'data.{key} = {getattr(data, key)} does not go with data.format = "idx", whose images '
                              'are alike; leave it out.')
    for key in ("image", "label"):
        value = getattr(data, key)
        if bool(value) != (data.format in IMAGE_TABLES):
            remedy = "write the column's name" if not value else "leave it out: only tables have columns"
            raise RecipeError(f"data.{key} = {shown(value)} does not go with data.format = {shown(data.format)}; "
                              f"{remedy}.")
