"""Pascal VOC: one XML file of boxes for each image, and lists of the images of each set."""

# Not torchvision's VOCDetection, which needs the folders VOCdevkit/VOC2012 and returns the file's text unread.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tersor.core.errors import InputError
from tersor.data.boxes import BACKGROUND, BoxedImage, boxed_images
from tersor.data.decoding import SUFFIXES, ImageFormat
from tersor.data.image_sets import Splits
from tersor.data.splitting import none_of


@dataclass(frozen=True)
class _Annotation:
    source: str
    names: list[str]
    boxes: list[list[float]]


def is_voc(folder: Path) -> bool:
    """Whether `folder` is laid out as Pascal VOC."""
    return (folder / "Annotations").is_dir() and (folder / "ImageSets" / "Main").is_dir()


def from_voc(folder: Path, form: ImageFormat) -> Splits:
    """Load `folder/JPEGImages`, the boxes of `folder/Annotations`, and the lists of `folder/ImageSets/Main`.

    `val.txt` is the test set if there is no `test.txt`, and lists validation images otherwise. Corners in the files are
    pixels counted from 1, and become edges counted from 0: a box from 1 to 10 is 10 pixels wide. Classes are numbered
    from 1 in the order of their names.

    Raises:
        InputError: a list, an annotation or an image is missing, an annotation is invalid, or test images have classes
            that no training image has.
    """
    lists = folder / "ImageSets" / "Main"
    train = "train" if (lists / "train.txt").is_file() else "trainval"
    test = "test" if (lists / "test.txt").is_file() else "val"
    for name in (train, test):
        if not (lists / f"{name}.txt").is_file():
            raise InputError(
                f"'{lists}' holds no {name}.txt. Write the names of the {name} images there, one per line."
            )
    parts = {"train": train, "test": test} | (
        {"val": "val"} if test == "test" and (lists / "val.txt").is_file() else {}
    )
    parts = {"train": parts.pop("train")} | ({} if train == "trainval" else parts) | {"test": test}
    read = {part: _annotations(folder, lists / f"{name}.txt") for part, name in parts.items()}
    classes = sorted({name for annotation in read["train"] for name in annotation.names})
    sets = {
        part: boxed_images([_record(folder, each, classes) for each in annotations], form)
        for part, annotations in read.items()
    }
    return Splits(sets["train"], sets.get("val") or none_of(sets["train"]), sets["test"], (BACKGROUND, *classes))


def _annotations(folder: Path, listed: Path) -> list[_Annotation]:
    # a list of one class has a second column, which says whether the image shows it
    names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    if not names:
        raise InputError(f"'{listed}' is empty. Write the names of images there, one per line.")
    return [_read(folder / "Annotations" / f"{name}.xml") for name in names]


def _read(path: Path) -> _Annotation:
    if not path.is_file():
        raise InputError(f"the annotation '{path}' does not exist. Add it, or remove the image from the lists.")
    try:
        objects = [*ElementTree.parse(path).getroot().iterfind("object")]  # noqa: S314  (expat refuses entity bombs)
    except (ElementTree.ParseError, ValueError) as error:
        raise InputError(f"'{path}' is not an XML file: {error}. Replace it.") from error
    names = [(each.findtext("name") or "").strip() for each in objects]
    try:
        corners = [[float(each.findtext(f"bndbox/{key}") or "") for key in _CORNERS] for each in objects]
    except ValueError as error:
        raise InputError(f"'{path}' has an object without {', '.join(_CORNERS)} in its bndbox. Correct it.") from error
    if not all(names):
        raise InputError(f"'{path}' has an object without a name. Correct it.")
    return _Annotation(str(path), names, [[left - 1, top - 1, right, bottom] for left, top, right, bottom in corners])


_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def _record(folder: Path, annotation: _Annotation, classes: list[str]) -> BoxedImage:
    unknown = [name for name in annotation.names if name not in classes]
    if unknown:
        raise InputError(
            f"'{annotation.source}' has the class '{unknown[0]}', which no training image has. Possible: "
            f"{', '.join(classes)}."
        )
    labels = [1 + classes.index(name) for name in annotation.names]
    stem = folder / "JPEGImages" / Path(annotation.source).stem
    path = next((found for suffix in SUFFIXES if (found := stem.with_name(stem.name + suffix)).is_file()), None)
    if path is None:
        raise InputError(f"there is no image '{stem}.jpg' for '{annotation.source}'. Add it.")
    return BoxedImage(str(path), annotation.boxes, labels, f"'{annotation.source}'")
