"""The `data` of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, Field, model_validator

from tersor.core.errors import InputError, counted
from tersor.core.import_path import named
from tersor.core.plain_values import PlainRecord
from tersor.training.options import PLAIN

Named = Annotated[str, Field(min_length=1)]
_Side = Annotated[int, Field(ge=1, le=8192)]
_Share = Annotated[float, Field(ge=0, le=1)]
_Deviation = Annotated[float, Field(gt=0)]
_Transforms = Annotated[list[str | dict[str, dict[str, Any] | None]], Field(min_length=1)]
_augmentation = named("augmentation", ("none", "flip", "crop_flip"))
_SOURCES = ("folder", "csv", "name")
_DEFAULT = "by default from the weights file, else computed from the training images"
YOUR_DATA = "your.module:splits"
"""The `name` in recipes of a search whose images were passed in Python: the user has to replace it."""


class DataSource(PlainRecord):
    """The images: a `folder`, a `csv` file, or a data set by its `name`."""

    model_config = PLAIN
    folder: Annotated[
        Path | None,
        Field(description="folder with train/ and test/: class folders, unlabeled images, masks, Pascal VOC or COCO"),
    ] = None
    csv: Annotated[
        Path | None,
        Field(description="CSV file: a column `path`, and a column `class`, a column `classes`, or columns of numbers"),
    ] = None
    name: Annotated[
        Named | None, Field(description="digits, scenes, a torchvision data set, or package.module:function")
    ] = None
    root: Annotated[Path | None, Field(description="folder of a torchvision data set")] = None
    image_size: Annotated[
        _Side | tuple[_Side, _Side] | None,
        Field(description="pixels of each side, or [height, width]; unchanged by default"),
    ] = None
    channels: Annotated[
        int, Field(ge=1, description="number of channels: 1 (grayscale), 3 (RGB) or 4; any number for tensors")
    ] = 3
    augment: Annotated[
        str | _Transforms,
        AfterValidator(lambda augment: _augmentation(augment) if isinstance(augment, str) else augment),
        Field(
            description="none, flip, crop_flip, a list of classes of torchvision.transforms.v2, or "
            "package.module:function"
        ),
    ] = "none"
    validation: Annotated[float, Field(ge=0, lt=1, description="fraction of the training images to hold out")] = 0.1
    limit: Annotated[int | None, Field(ge=1, description="number of training images; all by default")] = None
    mean: Annotated[
        tuple[_Share, ...] | None,
        Field(description=f"mean of each channel, in 0..1; {_DEFAULT}"),
    ] = None
    std: Annotated[
        tuple[_Deviation, ...] | None,
        Field(description=f"standard deviation of each channel, in 0..1; {_DEFAULT}"),
    ] = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [key for key in _SOURCES if getattr(self, key) is not None]
        if len(given) != 1:
            advice = "Keep one of them." if given else "Write one of them."
            sources, found = ", ".join(_SOURCES), " and ".join(given) or "none"
            raise InputError(f"data needs exactly one of {sources}, got {found}. {advice}")
        if (self.mean is None) != (self.std is None):
            present, missing = ("mean", "std") if self.std is None else ("std", "mean")
            raise InputError(f"data has `{present}` without `{missing}`. Write both `mean` and `std`, or neither.")
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != self.channels:
                raise InputError(
                    f"data.{key} has {counted(len(values), 'number')}, and the images have "
                    f"{counted(self.channels, 'channel')}. Write {counted(self.channels, 'number')}"
                    + (", or channels: 1 for grayscale images." if len(values) == 1 else ".")
                )
        return self
