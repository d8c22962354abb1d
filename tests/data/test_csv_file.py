import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data import load


@pytest.fixture
def table(tmp_path):
    """A function that writes a CSV file next to ten images, and returns its path."""
    for number in range(10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")

    def write(header, *cells, encoding="utf-8"):
        rows = [f"{number}.png,{each}" for number, each in enumerate(cells)]
        (tmp_path / "table.csv").write_text("\n".join([header, *rows]) + "\n", encoding=encoding)
        return tmp_path / "table.csv"

    return write


def numbers_of(images):
    return images.take(torch.arange(len(images)))[:, 0, 0, 0].tolist()


def test_values(table):
    splits = load(csv=table("path,x,y", *(f"{number}.5,{-number}" for number in range(10))), validation=0)
    assert splits.classes == ("x", "y")
    assert (len(splits.train), len(splits.test)) == (8, 2)
    for images in (splits.train, splits.test):
        expected = [[number + 0.5, -number] for number in numbers_of(images)]
        assert images.targets_at(torch.arange(len(images))).tolist() == expected


def test_a_class_column_gives_one_label_per_image(table):
    path = table("path,class", *("cat" if number % 2 else "dog" for number in range(10)), encoding="utf-8-sig")
    splits = load(csv=path, validation=0.2)
    assert splits.classes == ("cat", "dog")
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [6, 2, 2]
    assert splits.test.targets.tolist().count(0) == 1, "stratified"
    for images in (splits.train, splits.validation, splits.test):
        assert images.targets.tolist() == [1 - number % 2 for number in numbers_of(images)]


def test_a_classes_column_gives_several_labels_per_image(table):
    path = table("path, split, classes", "train,cat; dog", "train,", "val,cow", "test,dog")
    splits = load(csv=path)
    assert splits.classes == ("cat", "cow", "dog")
    assert splits.train.targets_at(torch.arange(2)).tolist() == [[1, 0, 1], [0, 0, 0]]
    assert splits.validation.targets_at(torch.arange(1)).tolist() == [[0, 1, 0]]
    assert numbers_of(splits.test) == [3]


@pytest.mark.parametrize(
    ("header", "cells", "words"),
    [
        ("path,x", [], "lists no images"),
        ("path", ["1"], "begins with path. Begin with a header"),
        ("0.png,3", ["1"], "Begin with a header"),
        ("path,class,x", ["cat,1"], "has the columns class, x"),
        ("path,x", ["1", "two"], "line 3: could not convert .*'two'. Write numbers"),
        ("path,x", ["1", "nan"], "line 3: a value is not finite"),
        ("path,x", ["1", "1,2"], "line 3 has 3 cells. Write 2: path, x"),
        ("path,x,y", ["1"], "line 2 has 2 cells. Write 3: path, x, y"),
        (
            "path,class",
            ["cat", "cat;dog"],
            "line 3: class is 'cat;dog'. Write one class, or rename the column 'class' to 'classes'",
        ),
        ("path,class", ["cat", ""], "line 3: class is ''"),
        ("path,split,x", ["training,1"], "split is 'training'. Possible: train, val, test"),
        ("path,split,x", ["train,1", "train,2"], "2 training and 0 test images"),
    ],
)
def test_invalid_tables_raise(table, header, cells, words):
    with pytest.raises(InputError, match=words):
        load(csv=table(header, *cells))


def test_files_that_are_not_csv_raise(table, tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load(csv=tmp_path / "none.csv")
    table("path,x", "1").write_text("path,x\n,1\n")
    with pytest.raises(InputError, match=r"line 2: path is empty\. Write the path of an image"):
        load(csv=tmp_path / "table.csv")
    table("path,x", "1").write_bytes(b"path,x\n\xff\xfe,1\n")
    with pytest.raises(InputError, match="not a CSV file in UTF-8"):
        load(csv=tmp_path / "table.csv")


def test_a_missing_image_raises(table, tmp_path):
    path = table("path,x", *"0123456789")
    (tmp_path / "4.png").unlink()
    with pytest.raises(InputError, match=r"4\.png' does not exist"):
        load(csv=path)


def test_a_python_file_instead_of_a_csv_file_raises(tmp_path):
    (tmp_path / "data.py").write_text("from pathlib import Path\n")
    with pytest.raises(InputError, match=r"data\.py' is a file\. Write .*data\.py:NAME, where NAME is a function"):
        load(csv=tmp_path / "data.py")
