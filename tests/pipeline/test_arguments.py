"""The arguments of the Python functions are checked before any work starts."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.data.network_inputs import TensorInputs
from tersor.pipeline.arguments import (
    check_classes,
    check_metadata,
    example_of,
    onnx_path,
    refuse_shared_weights,
    student_of,
    teacher_of,
    to_compress,
    to_export,
)

IMAGES = torch.rand(2, 3, 4, 4)


def network():
    return nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(32, 5))


def test_a_copy_is_compressed_and_enough_batches_are_kept():
    given = network()
    made, batches, first = to_compress(given, iter([IMAGES] * 5), 3)
    assert torch.equal(first, IMAGES)
    assert made is not given
    assert len(batches) == 2
    with pytest.raises(InputError, match="does not run on images"):
        to_compress(network(), [IMAGES[:, :1]], 3)
    with pytest.raises(InputError, match="no parameters"):
        to_compress(nn.Flatten(), [IMAGES], 3)


def test_an_exported_network_has_to_return_tensors():
    given = network()
    assert to_export(given, IMAGES, "it") is not given
    text = network()
    text.forward = lambda _images: "text"
    with pytest.raises(InputError, match="returns a str"):
        to_export(text, IMAGES, "it")


def test_students_have_to_be_float32_and_teachers_are_converted():
    student = network()
    assert student_of(nn.DataParallel(student)) is student
    with pytest.raises(InputError, match=r"every parameter of the student is frozen"):
        student_of(network().requires_grad_(False))
    partly = network()
    partly[0].requires_grad_(False)
    student_of(partly)
    for kind in (torch.float64, torch.float16):
        with pytest.raises(InputError, match=f"has weights of type {kind}"):
            student_of(network().to(kind))
    with pytest.raises(InputError, match="no parameters"):
        student_of(nn.Flatten())
    teacher = network()
    assert teacher_of(teacher) is teacher
    half = network().half()
    converted = teacher_of(half)
    assert {each.dtype for each in converted.state_dict().values()} == {torch.float32, torch.int64}
    assert half[0].weight.dtype == torch.float16
    with pytest.raises(InputError, match="no parameters"):
        teacher_of(nn.Flatten())


def test_student_and_teacher_cannot_share_weights():
    student = network()
    refuse_shared_weights(student, copy.deepcopy(student))
    with pytest.raises(InputError, match="the same network"):
        refuse_shared_weights(student, student)
    for count, words in (
        (1, r"share 0\.weight, 0\.bias, and"),
        (4, r"share 0\.weight, 0\.bias, 1\.weight, \.\.\., and"),
    ):
        teacher = network()
        for place in range(count):
            teacher[place] = student[place]
        with pytest.raises(InputError, match=words):
            refuse_shared_weights(student, teacher)


def test_invalid_file_paths_raise(tmp_path):
    assert onnx_path(str(tmp_path / "a.onnx")) == onnx_path(tmp_path / "a.onnx") == tmp_path / "a.onnx"
    for wrong in (tmp_path / "a.xml", tmp_path / "missing" / "a.onnx", f"{tmp_path}/a\0.onnx"):
        with pytest.raises(InputError, match=r"Possible: an \.onnx file in an existing folder"):
            onnx_path(wrong)
    with pytest.raises(InputError, match="of type int"):
        onnx_path(3)
    assert onnx_path(Path("a.onnx")) == Path("a.onnx")


def test_examples_are_a_batch_of_images_or_several_inputs():
    assert torch.equal(example_of(IMAGES), IMAGES)
    assert isinstance(example_of((IMAGES, IMAGES)), TensorInputs)
    assert isinstance(example_of({"a": IMAGES}), TensorInputs)
    for wrong, words in (
        (IMAGES[:0], "no images"),
        (IMAGES[0], "single image"),
        ("x", "of type str"),
        ([IMAGES], "list"),
    ):
        with pytest.raises(InputError, match=words):
            example_of(wrong)


def test_class_names_and_normalization_are_checked():
    check_metadata(["a", "b"], ([0.5] * 3, [0.2] * 3), IMAGES)
    check_metadata((), None, IMAGES)
    check_metadata([], ([-2.0] * 3, [2.0] * 3), IMAGES)
    for classes, words in (
        ("abc", "a list of names"),
        (3, "a list of names"),
        (["a", "a"], "distinct"),
        (["a", 1], "distinct"),
    ):
        with pytest.raises(InputError, match=words):
            check_metadata(classes, None, IMAGES)
    wrong = (
        ([0.5] * 2, [0.2] * 2), ([0.5] * 3, [0.2] * 2), ([0.5] * 3, [0.2, 0.2, 0.0]),
        ([0.5, 0.5, float("nan")], [0.2] * 3),
        ([0.5] * 3,), 3, ("a", "b"),
    )  # fmt: skip
    for pixels in wrong:
        with pytest.raises(InputError, match="two lists of 3 numbers, the second above 0"):
            check_metadata([], pixels, IMAGES)
    for pixels in (([127.0] * 3, [0.2] * 3), ([0.5] * 3, [64.0] * 3), ([-2.1] * 3, [0.2] * 3)):
        with pytest.raises(InputError, match=r"in \[0, 1\], not in 0 to 255"):
            check_metadata([], pixels, IMAGES)
    with pytest.raises(InputError, match="needs a network with one input"):
        check_metadata([], ([0.5] * 3, [0.2] * 3), TensorInputs((IMAGES, IMAGES)))


class Session:
    """A session with three logits for images of any size."""

    def __init__(self, logits=(1, 3)):
        self.inputs = [type("Input", (), {"name": "x", "shape": (None, 3, None, 8), "dtype": np.float32})]
        self.logits = np.zeros(logits, np.float32)
        self.given = None

    def run(self, inputs):
        self.given = inputs.kwargs["x"].shape
        return self.logits


def test_the_number_of_class_names_has_to_equal_the_number_of_logits():
    session = Session()
    check_classes(session, ["a", "b", "c"])
    assert session.given == (1, 3, 1, 8)
    check_classes(session, [])
    with pytest.raises(InputError, match="2 class names are given, and the network has 3 logits"):
        check_classes(session, ["a", "b"])
    check_classes(Session((1, 4, 2, 2)), ["a", "b"])
