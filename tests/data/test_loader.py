"""The batches of a user's loader: images, labels, targets, and the errors for invalid ones."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tersor.core.errors import InputError
from tersor.data.batch import Batch, images_of, labels_of, parts_of
from tersor.data.batch_errors import explain_batchnorm_error, images_error, labels_error
from tersor.data.batch_source import groups
from tersor.data.loader import Loader, batches_of, targets_in, unchecked_labels

IMAGES = torch.rand(2, 3, 4, 4)
VIDEOS = torch.rand(2, 3, 5, 4, 4)
LABELS = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("batch", "images", "targets"),
    [
        (Batch(IMAGES, LABELS), IMAGES, LABELS),
        ({"pixel_values": IMAGES, "labels": LABELS}, IMAGES, LABELS),
        ({"x": VIDEOS, "y": LABELS, "z": torch.zeros(2, 3)}, VIDEOS, LABELS),
        ({"x": IMAGES, "y": VIDEOS, "a": LABELS, "b": LABELS}, None, None),
        ([IMAGES, LABELS, 3], IMAGES, LABELS),
        ((IMAGES,), IMAGES, None),
        (IMAGES, IMAGES, None),
        ([], [], None),
    ],
)
def test_batches_are_split_into_images_and_targets(batch, images, targets):
    assert parts_of(batch) == (images, targets) or (parts_of(batch)[0] is images and parts_of(batch)[1] is targets)


def test_images_are_a_copy_in_float32():
    found = images_of((IMAGES.double(), LABELS))
    assert found.dtype == torch.float32
    same = images_of(IMAGES)
    assert torch.equal(same, IMAGES)
    assert same.data_ptr() != IMAGES.data_ptr()
    assert images_of((IMAGES * 255).byte()).dtype == torch.uint8
    assert images_of(VIDEOS).shape == VIDEOS.shape
    assert len(images_of(((IMAGES, LABELS), None)).all()) == 2
    with pytest.raises(InputError, match="meta device"):
        images_of(IMAGES.to("meta"))
    for wrong in (IMAGES[0], "x", torch.rand(2, 2, 2, 2, 2, 2)):
        with pytest.raises(InputError, match="a batch of the data is"):
            images_of(wrong)


def test_labels_are_one_class_index_per_image():
    assert labels_of((IMAGES, LABELS)) is LABELS
    for other in (LABELS[:1], LABELS.float(), LABELS[:, None], [0, 1], None):
        assert labels_of((IMAGES, other)) is None


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (IMAGES[0], r"shape \(3, 4, 4\)\. .*For a single image \(C, H, W\), wrap"),
        ([[torch.rand(2, 3)]], r"a tensor of shape \(2, 3\)\. Possible"),
        ({"a": 1, "b": 2}, "It has the keys 'a', 'b'; exactly one"),
        (np.zeros(3), r"type ndarray.*torch\.from_numpy"),
        ("text", r"of type str\. Possible: .*\.$"),
    ],
)
def test_the_error_for_invalid_images_states_the_reason(batch, words):
    with pytest.raises(InputError, match=words):
        raise images_error(batch)


@pytest.mark.parametrize(
    ("labels", "classes", "least", "words"),
    [
        ([0, 1, 2], 3, None, None),
        ([0, 1, 2], None, None, None),
        ([1, 2, 2], 3, None, None),
        ([1, 2, 3], 3, None, r"from 1 to 3, but the 3 classes .* numbered from 0 to 2\. Write labels - 1"),
        ([2, 3, 3], 3, 1, "range from 1 to 3"),
        ([2, 3, 3], 3, 0, "from 2 to 3. .* because the network has 3 classes"),
        ([0, 3, 3], 3, 1, "because the network has 3 classes"),
        ([1, 2, 4], 3, None, "because the network has 3 classes"),
        ([-1, 0, 1], 3, None, "from -1 to 1.*Leave out unlabeled images"),
        ([0.0, 1.0, 2.0], 3, None, r"labels\.long"),
        ([True, False, True], 3, None, r"labels\.long"),
        ([[0], [1], [2]], 3, None, r"labels\.squeeze\(1\)"),
        ([[0, 1], [1, 0], [1, 0]], 3, None, r"labels\.argmax\(1\)"),
        ([0, 1], 3, None, r"shape \(2,\)\. Possible: class indices \(3,\) from 0 to 2\.$"),
        ([0, 1], None, None, r"Possible: class indices \(3,\) from 0\.$"),
    ],
)
def test_the_error_for_invalid_labels_states_the_reason(labels, classes, least, words):
    error = labels_error(torch.tensor(labels), 3, classes, least)
    if words is None:
        assert error is None
    else:
        with pytest.raises(InputError, match=words):
            raise error
    assert labels_error(torch.zeros(0, dtype=torch.int64), 0, 3) is None


def test_only_the_batchnorm_error_for_small_batches_is_explained():
    for count, word in ((1, "has 1 image. Drop"), (2, "has 2 images. Drop")):
        with pytest.raises(InputError, match=word), explain_batchnorm_error(count):
            torch.nn.functional.batch_norm(torch.zeros(1, 3, 1, 1), None, None, training=True)
    with pytest.raises(ValueError, match="other"), explain_batchnorm_error(1):
        raise ValueError("other")


def test_a_loader_can_be_a_tensor_a_list_or_a_generator():
    batches, first = batches_of(IMAGES)
    assert [len(each) for each in batches] == [2]
    assert torch.equal(first, IMAGES)
    given = [(IMAGES, LABELS)]
    assert batches_of(given)[0] is given
    kept, _ = batches_of(iter([IMAGES, IMAGES, IMAGES]), 3)
    assert len(kept) == 2, "of a generator, as many batches as hold three images"
    assert len(batches_of(iter([IMAGES, IMAGES, IMAGES]), 4)[0]) == 2
    assert len(batches_of(iter([IMAGES, IMAGES, IMAGES]))[0]) == 3
    assert len(batches_of([VIDEOS, VIDEOS])[0]) == 2
    assert len(batches_of([IMAGES, IMAGES])[0]) == 2, "two batches of images"


@pytest.mark.parametrize(
    ("loader", "words"),
    [
        ((IMAGES, LABELS), "a batch was passed as the loader"),
        ([IMAGES, LABELS], "a batch was passed as the loader"),
        ("digits", "of type str"),
        ({"x": IMAGES}, "of type dict"),
        (3, "of type int"),
        ([], "the loader is empty"),
        ([IMAGES[:0]], "the first batch has no image"),
    ],
)
def test_invalid_loaders_raise(loader, words):
    with pytest.raises(InputError, match=words):
        batches_of(loader)


def test_targets_are_found_by_a_common_name_or_as_the_only_other_value():
    masks = torch.zeros(2, 4, 4)
    assert targets_in((IMAGES, masks)) is masks
    assert targets_in({"image": IMAGES, "extra": LABELS, "mask": masks}) is masks
    assert targets_in({"image": IMAGES, "anything": masks}) is masks
    assert targets_in({"image": IMAGES, "one": masks, "two": masks}) is None
    assert targets_in({"image": IMAGES}) is None
    assert unchecked_labels((IMAGES, LABELS)) is LABELS
    assert unchecked_labels((IMAGES, [1, 2])) is None
    for read in (targets_in, unchecked_labels):
        with pytest.raises(InputError, match="numpy array"):
            read((IMAGES, np.zeros(2)))


@pytest.mark.parametrize("labels", [[1, 0], (1, 0)])
def test_labels_in_a_list_raise(labels):
    kind = type(labels).__name__
    with pytest.raises(InputError, match=rf"the labels of a batch are of type {kind}\. Write torch\.tensor\(labels\)"):
        list(Loader([(torch.rand(2, 3, 4, 4), labels)], 2))


def test_a_checked_loader_returns_class_indices_other_targets_or_none():
    loader = Loader([(IMAGES, LABELS.int()), (IMAGES, LABELS)], 2)
    assert len(loader) == 2
    assert [batch.targets.tolist() for batch in loader] == [[0, 1], [0, 1]]
    assert next(iter(loader)).targets.dtype == torch.int64
    assert next(iter(Loader([(IMAGES, "any")], None, targets=True))).targets == "any"
    assert next(iter(Loader([(IMAGES, "any")], None))).targets is None
    for given, options, words in (
        ([IMAGES], {"classes": 2}, "a batch has no labels"),
        ([IMAGES], {"classes": None, "targets": True}, "a batch has no targets"),
        ([IMAGES[:0]], {"classes": None}, "a batch of the data is empty"),
        ([IMAGES.byte()], {"classes": None}, "floating-point"),
        ([(IMAGES, LABELS + 1), (IMAGES, LABELS + 1)], {"classes": 2}, "range from 1 to 2"),
    ):
        with pytest.raises(InputError, match=words):
            list(Loader(given, **options))
    # the lowest label of all batches is used
    first_zero = Loader([(IMAGES, LABELS), (IMAGES, LABELS + 1)], 2)
    with pytest.raises(InputError, match="because the network has 2 classes"):
        list(first_zero)


def test_the_epoch_is_passed_to_a_distributed_sampler():
    data = TensorDataset(IMAGES, LABELS)
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    Loader(DataLoader(data, sampler=sampler), 2).set_epoch(7)
    assert sampler.epoch == 7
    Loader([IMAGES], None).set_epoch(7)


class Numbers:
    """An epoch of seven batches, each of which is a number."""

    def __init__(self):
        self.epochs = []

    def __len__(self):
        return 7

    def __iter__(self):
        return iter(range(7))

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


@pytest.mark.parametrize("first", range(8))
def test_groups_of_batches_continue_from_any_step(first):
    def read(start, count):
        source = Numbers()
        found = []
        for group in groups(source, 3, start):
            numbers = list(group.batches)
            assert len(numbers) == group.size
            found.append((source.epochs[-1], numbers, group.first))
            if len(found) == count:
                return found
        return found

    whole = read(0, 9)
    assert whole[:4] == [(0, [0, 1, 2], True), (0, [3, 4, 5], False), (0, [6], False), (1, [0, 1, 2], True)]
    assert read(first, 9 - first) == whole[first:]
