"""Images and targets of any data set with a length: torch's, torchvision's, Hugging Face's, or a list."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from tersor.core.errors import InputError
from tersor.data.boxes import BACKGROUND, Target, box_target, scaled
from tersor.data.decoding import ImageFormat, mask_of, pixels_of
from tersor.data.image_sets import Decoded, LazyTargets
from tersor.data.mask_folder import IGNORE

Kind = Literal["class", "values", "mask", "boxes"]

_IMAGE_KEYS = ("image", "img", "images", "pixel_values")
_TARGET_KEYS = ("label", "labels", "target", "targets", "mask", "annotation", "objects")
_POSSIBLE = (
    "Possible: a pair (image, target), or a dict with the image under image or img. The image is a PIL image or a "
    "uint8 tensor (C, H, W); the target is a class index, one or more numbers (regression or multi-label), a mask "
    "(H, W) of class indices, or a dict of boxes (K, 4) and labels (K,)."
)


@dataclass(frozen=True)
class ItemSet:
    """A data set whose items are read by number.

    Attributes:
        name: name of the data set in error messages.
        dataset: has a length, and `dataset[number]` is an item.
    """

    name: str
    dataset: Any

    def __post_init__(self) -> None:
        if isinstance(self.dataset, DataLoader):
            raise InputError(
                f"{self.name}: a DataLoader is given. Give its data set instead (`loader.dataset`). The items must be "
                "single images that are not normalized."
            )
        if not hasattr(self.dataset, "__getitem__") or not hasattr(self.dataset, "__len__") or not len(self.dataset):
            raise InputError(
                f"{self.name}: the {type(self.dataset).__name__} is empty, has no length, or cannot be indexed. Give "
                "a data set with a length and items by number."
            )

    def item(self, number: int) -> tuple[Any, Any]:
        """The image and the target."""
        item = self.dataset[number]
        if isinstance(item, Mapping):
            return self._parts(cast("Mapping[str, Any]", item), number)
        if not isinstance(item, tuple | list) or len(cast("list[Any]", item)) != 2:
            raise InputError(f"{self.name}: item {number} is {described(item)}. {_POSSIBLE}")
        return cast("tuple[Any, Any]", tuple(cast("list[Any]", item)))

    def _parts(self, item: Mapping[str, Any], number: int) -> tuple[Any, Any]:
        """The image of a dict, and its boxes, or the only other value that can be the target."""
        key = next((key for key in _IMAGE_KEYS if key in item), None)
        others = {name: value for name, value in item.items() if name != key and not name.endswith("id")}
        if key is not None and "boxes" in others:
            return item[key], others
        known = [name for name in others if name in _TARGET_KEYS or len(others) == 1]
        if key is not None and len(known) == 1:
            return item[key], others[known[0]]
        raise InputError(
            f"{self.name}: item {number} is a dict with the keys {', '.join(map(repr, item))}, and it is unclear which "
            f"are the image and the target. {_POSSIBLE} Wrap the data set so that its items are pairs (image, target), "
            "for example in a function that you give as data: package.module:function."
        )

    def kind(self) -> Kind:
        """The kind of the targets, determined from item 0."""
        _, target = self.item(0)
        if _class_number(target) is not None:
            return "class"
        if isinstance(target, Mapping):
            return "boxes"
        if isinstance(target, Image.Image) or np.ndim(target) >= 2:
            return "mask"
        if isinstance(target, float) or np.ndim(target) == 1 or (np.ndim(target) == 0 and hasattr(target, "dtype")):
            return "values"
        raise InputError(f"{self.name}: the target of item 0 is {described(target)}. {_POSSIBLE}")

    def images(self, kind: Kind, form: ImageFormat, threads: int) -> Decoded:
        """The images, decoded on demand, with their targets. All targets except masks are read here."""
        form = replace(form, crop=form.crop and kind in {"class", "values"})
        count = len(self.dataset)

        def read(number: int) -> NDArray[Any]:
            image, target = self.item(number)
            if kind == "class" and target != targets[number]:
                raise InputError(
                    f"{self.name}: image {number} has label {target}, but had label {int(targets[number])} before. "
                    "Return the same label each time."
                )
            return pixels_of(image, form, f"{self.name}: image {number}")

        targets: Any
        match kind:
            case "class":
                targets = self._class_numbers()
            case "values":
                targets = self._values()
            case "mask":
                targets = LazyTargets(count, lambda number: self._mask(number, form))
            case "boxes":
                targets = [self._boxes(number, form) for number in range(count)]
        return Decoded(targets, read, threads)

    def _class_numbers(self) -> Tensor:
        """The labels that the data set lists, as torchvision's and Hugging Face's do; else all items are loaded."""
        listings = {name: getattr(self.dataset, name, None) for name in ("targets", "labels")}
        if "label" in (getattr(self.dataset, "column_names", None) or ()):  # of Hugging Face
            listings["label"] = self.dataset["label"]
        for name, listed in listings.items():
            whole = listed is not None and len(listed) == len(self.dataset)
            if whole and getattr(self.dataset, "target_transform", None) is None:
                return self._listed(name, np.asarray(listed))
        found: list[int] = []
        for number in range(len(self.dataset)):
            target = self.item(number)[1]
            label = _class_number(target)
            if label is None:
                raise InputError(
                    f"{self.name}: the label of item {number} is {described(target)}. Possible: a class index (int)."
                )
            found.append(label)
        return torch.tensor(found)

    def _listed(self, attribute: str, listed: NDArray[Any]) -> Tensor:
        """Labels (N,) as int64."""
        if listed.ndim != 1 or listed.dtype.kind not in "iu":
            advice = "Write labels.argmax(1)" if listed.ndim > 1 and listed.shape[-1] > 1 else "Convert them"
            raise InputError(
                f"{self.name}: '{attribute}' has the data type {listed.dtype} and the shape {listed.shape}. Possible: "
                f"class indices ({len(listed)},), integers from 0. {advice}."
            )
        return torch.from_numpy(listed.astype(np.int64))

    def _values(self) -> Tensor:
        """(N, V) float32."""
        rows: list[Tensor] = []
        for number in range(len(self.dataset)):
            target = self.item(number)[1]
            try:
                row = torch.as_tensor(target, dtype=torch.float32).reshape(-1)
            except (TypeError, ValueError, RuntimeError) as error:
                raise InputError(
                    f"{self.name}: the target of item {number} is not a number: {error}. {_POSSIBLE}"
                ) from error
            if (rows and len(row) != len(rows[0])) or not row.isfinite().all():
                raise InputError(
                    f"{self.name}: item {number} has the values {row.tolist()}. Possible: finite numbers, as many as "
                    "item 0 has."
                )
            rows.append(row)
        return torch.stack(rows)

    def _mask(self, number: int, form: ImageFormat) -> Tensor:
        image, mask = self.item(number)
        name = f"{self.name}: mask {number}"
        values = np.asarray(mask)
        numbers = mask_of(values[0] if values.ndim == 3 and len(values) == 1 else mask, None, name)
        if numbers.shape != _size(image):
            raise InputError(
                f"{name} has the shape {numbers.shape}, and its image {_size(image)}. Make their sizes equal."
            )
        return torch.from_numpy(mask_of(numbers, form.size, name).copy())

    def _boxes(self, number: int, form: ImageFormat) -> Target:
        image, target = self.item(number)
        name = f"{self.name}: item {number}"
        if not isinstance(target, Mapping):
            raise InputError(f"{name} has {described(target)} instead of boxes. {_POSSIBLE}")
        boxes, labels = _corners(cast("Mapping[str, Any]", target), name)
        size = _size(image)
        return scaled(box_target(boxes, labels, size, name), size, form.size or size)


def class_names(sets: list[Decoded], kind: Kind, train: Any) -> tuple[str, ...]:
    """The names of the classes that `train` lists; numbers if it lists none, and for values."""
    if kind == "values":
        return tuple(str(number) for number in range(sets[0].targets.shape[1]))
    names = getattr(train, "classes", None)
    if names is None and kind == "class":  # a ClassLabel of Hugging Face
        features = getattr(train, "features", None) or {}
        names = next((feature.names for feature in features.values() if hasattr(feature, "names")), None)
    if names is None:
        return tuple(str(number) for number in range(1 + max(_largest(images, kind) for images in sets)))
    listed = tuple(", ".join(each) if isinstance(each, tuple) else str(each) for each in names)
    return (BACKGROUND, *listed) if kind == "boxes" and BACKGROUND not in listed[0] else listed


def described(value: object) -> str:
    """Describe a value of the wrong type in an error message."""
    length = f" of length {len(cast('Any', value))}" if isinstance(value, tuple | list) else ""
    return f"a {type(value).__name__}{length}"


def _largest(images: Decoded, kind: Kind) -> int:
    if kind == "class":
        return int(images.targets.max())
    if kind == "boxes":
        return max((int(each["labels"].max()) for each in images.targets if len(each["labels"])), default=0)
    counted = (mask[mask != IGNORE] for mask in images.targets)
    return max(int(each.max()) if each.numel() else 0 for each in counted)


def _class_number(target: Any) -> int | None:
    try:
        return operator.index(target)
    except TypeError:
        return None


def _size(image: Any) -> tuple[int, int]:
    """Height and width; (0, 0) if it is not an image; decoding it then raises the error."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return cast("tuple[int, int]", tuple(image.shape[-2:])) if isinstance(image, Tensor) else (0, 0)


def _corners(target: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Boxes as left, top, right, bottom, and labels from 1, of torchvision's or Hugging Face's keys."""
    if "boxes" in target and "labels" in target:
        boxes = target["boxes"]
        if getattr(getattr(boxes, "format", None), "name", "XYXY") != "XYXY":
            from torchvision.transforms.v2.functional import convert_bounding_box_format  # imported here: it is slow
            from torchvision.tv_tensors import BoundingBoxFormat

            boxes = convert_bounding_box_format(boxes, new_format=BoundingBoxFormat.XYXY)
        return boxes, target["labels"]
    if "bbox" in target and "category" in target:  # Hugging Face: left, top, width, height; classes from 0
        boxes = np.asarray(target["bbox"], np.float32).reshape(-1, 4)
        return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1), [1 + each for each in target["category"]]
    raise InputError(
        f"{name} has a dict of {', '.join(map(repr, target))}. Possible: boxes (left, top, right, bottom) and labels "
        "from 1, or bbox (left, top, width, height) and category from 0, as in Hugging Face's data sets."
    )
