"""COCO: one JSON file of boxes for each set of images."""

# Not torchvision's CocoDetection, which needs pycocotools, and only to read these files.

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tersor.core.errors import InputError
from tersor.data.boxes import BACKGROUND, BoxedImage, boxed_images
from tersor.data.decoding import ImageFormat
from tersor.data.image_sets import Splits
from tersor.data.splitting import none_of

_SETS = {"train": ("train",), "val": ("val", "valid"), "test": ("test",)}


class _Image(BaseModel):
    id: int
    file_name: str


class _Category(BaseModel):
    id: int
    name: str


class _Annotation(BaseModel):
    image_id: int
    category_id: int
    bbox: Annotated[list[float], Field(min_length=4, max_length=4)]
    iscrowd: int = 0


class _File(BaseModel):
    """The keys that are read from a file; other keys are ignored."""

    model_config = ConfigDict(extra="ignore")
    images: Annotated[list[_Image], Field(min_length=1)]
    categories: Annotated[list[_Category], Field(min_length=1)]
    annotations: list[_Annotation]


@dataclass(frozen=True)
class _Set:
    path: Path
    content: _File


def files_of(folder: Path) -> dict[str, Path]:
    """The JSON file of each set ("train", "val", "test") that `folder` holds; empty if it is not laid out as COCO."""
    found: dict[str, Path] = {}
    for which, names in _SETS.items():
        beside = [path for name in names for path in sorted((folder / name).glob("*.json"))]
        listed = [path for path in sorted((folder / "annotations").glob("*.json")) if _is_of(path.stem, names)]
        if beside or listed:
            found[which] = (beside or sorted(listed, key=lambda path: not path.stem.startswith("instances")))[0]
    return found


def _is_of(stem: str, names: tuple[str, ...]) -> bool:
    """Whether a file such as `instances_train2017` is of the set."""
    return stem.rpartition("_")[2].rstrip("0123456789") in names


def from_coco(folder: Path, form: ImageFormat) -> Splits:
    """Load `folder/annotations/*_{train,val,test}*.json`, or `folder/{train,val,test}/*.json` beside the images.

    `val` is the test set if there is no annotated `test`, and the validation set otherwise. Classes are numbered from 1
    in the order of the category ids. Boxes of crowds and boxes without area are left out, as in torchvision's training
    scripts.

    Raises:
        InputError: a file is missing or invalid, or the sets have different categories.
    """
    files = files_of(folder)
    sets = {which: _Set(path, _read(path)) for which, path in files.items()}
    if "test" in sets and "val" in sets and not sets["test"].content.annotations:
        del sets["test"]  # COCO does not publish the boxes of its test images
    if "test" not in sets and "val" in sets:
        sets["test"] = sets.pop("val")
    for which in ("train", "test"):
        if which not in sets:
            raise InputError(
                f"'{folder}' holds no COCO file of the {which} set. Add annotations/instances_{which}.json."
            )
    names = _categories(sets["train"])
    for one in sets.values():
        if _categories(one) != names:
            raise InputError(
                f"'{one.path}' and '{sets['train'].path}' have different categories. Use the same categories in both."
            )
    number_of = {identity: number for number, identity in enumerate(sorted(names), start=1)}
    images = {which: boxed_images(_records(folder, one, number_of), form) for which, one in sets.items()}
    classes = (BACKGROUND, *(names[identity] for identity in number_of))
    return Splits(images["train"], images.get("val") or none_of(images["train"]), images["test"], classes)


def _read(path: Path) -> _File:
    try:
        return _File.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first: Any = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(f"'{path}' is not a COCO file of boxes: {place}: {first['msg']}. Correct it.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"'{path}' is not a JSON file: {error}. Replace it.") from error


def _categories(one: _Set) -> dict[int, str]:
    return {category.id: category.name for category in one.content.categories}


def _records(folder: Path, one: _Set, number_of: dict[int, int]) -> list[BoxedImage]:
    place = _place(folder, one)
    records = {
        image.id: BoxedImage(str(place / image.file_name), [], [], f"'{one.path}', image {image.file_name}")
        for image in one.content.images
    }
    for each in one.content.annotations:
        record = records.get(each.image_id)
        if record is None or each.category_id not in number_of:
            what = f"image_id {each.image_id}" if record is None else f"category_id {each.category_id}"
            where = "images" if record is None else "categories"
            raise InputError(
                f"'{one.path}' has an annotation with {what}, which is not among its {where}. Remove the annotation."
            )
        left, top, width, height = each.bbox
        if width < 0 or height < 0:
            raise InputError(
                f"{record.source} has a box of {width:g}x{height:g} pixels. Write left, top, width, height."
            )
        if not each.iscrowd and width > 0 and height > 0:
            record.boxes.append([left, top, left + width, top + height])
            record.labels.append(number_of[each.category_id])
    return list(records.values())


def _place(folder: Path, one: _Set) -> Path:
    """The folder of the image files."""
    name = one.content.images[0].file_name
    places = [one.path.parent, folder / one.path.stem.rpartition("_")[2], folder / "images", folder]
    for place in places:
        if (place / name).is_file():
            return place
    tried = ", ".join(f"'{place}'" for place in places)
    raise InputError(f"the image '{name}' of '{one.path}' is in none of {tried}. Add the images.")
