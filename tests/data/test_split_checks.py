"""Checks that the training, validation and test images fit together, and how the sets are drawn."""

import pytest
import torch

from tersor.core.errors import InputError
from tersor.data.image_sets import Decoded, LazyTargets, Pixels, Splits, View, bytes_in_memory, in_memory, strata
from tersor.data.split_checks import check_splits, check_targets
from tersor.data.splitting import limited, none_of, with_test_set, with_validation


def images(labels, *, size=8, channels=3, dtype=torch.uint8):
    targets = torch.tensor(labels) if isinstance(labels, list) and isinstance(labels[0], int) else labels
    return Pixels(torch.zeros(len(targets), size, size + 1, channels, dtype=dtype), targets)


def splits(train=(0, 1), test=(0, 1), validation=(), classes=2, **options):
    sets = [images(torch.tensor(each, dtype=torch.int64), **options)
            for each in (train, validation, test)]  # fmt: skip
    return Splits(*sets, tuple("abcdef"[:classes]))


def test_matching_sets_are_accepted():
    check_splits(splits(), None, 3)
    check_splits(splits(), (8, 9), 3)
    check_splits(splits(test=(0,), validation=(1,)), None, 3)


@pytest.mark.parametrize(
    ("given", "size", "channels", "words"),
    [
        (splits(classes=1, train=(0, 0), test=(0,)), None, 3, r"a single class \(a\)"),
        (splits(train=(0,)), None, 3, "1 training and 2 test images"),
        (splits(test=()), None, 3, "2 training and 0 test images"),
        (splits(train=(0, 2)), None, 3, "training labels range from 0 to 2, but there are 2 classes"),
        (splits(test=(-1, 0)), None, 3, r"test labels range from -1 to 0.*from 0 to 1\.$"),
        (splits(validation=(1, 2)), None, 3, "validation labels range from 1 to 2.*subtract 1 from every label"),
        (splits(), (9, 8), 3, r"images of 9x8 pixels, but image_size is \[9, 8\]"),
        (splits(), (8, 8), 3, "images of 9x8 pixels, but image_size is 8"),
        (splits(), None, 1, "the images have 3 channels"),
        (
            Splits(images([0, 1]), none_of(images([0])), images([0], size=9), ("a", "b")), None, 3,
            "9x8 pixels, test images 10x9",
        ),
        (
            Splits(images([0, 1]), images([1], dtype=torch.uint16), images([0]), ("a", "b")), None, 3,
            "up to 255, validation images up to 65535",
        ),
    ],
)  # fmt: skip
def test_mismatched_sets_raise(given, size, channels, words):
    with pytest.raises(InputError, match=words):
        check_splits(given, size, channels)


def with_targets(targets):
    return Splits(images(targets), none_of(images([0])), images(targets), ("background", "a", "b"))


def test_a_class_index_in_masks_or_boxes_without_a_name_raises():
    masks = torch.tensor([[[0, 2], [255, 1]]], dtype=torch.uint8)
    check_targets(with_targets(masks))
    check_targets(with_targets(torch.full((1, 2, 2), 255, dtype=torch.uint8)))
    masks[0, 0, 0] = 3
    with pytest.raises(InputError, match="the training images have the class index 3, and there are 3 classes"):
        check_targets(with_targets(masks))
    boxes = [{"labels": torch.tensor([2])}, {"labels": torch.tensor([], dtype=torch.int64)}]
    check_targets(with_targets(boxes))
    boxes[1]["labels"] = torch.tensor([1, 3])
    with pytest.raises(InputError, match="class index 3"):
        check_targets(with_targets(boxes))
    check_targets(with_targets(torch.tensor([5])))


def test_a_fifth_of_every_class_becomes_the_test_set():
    labels = [0] * 10 + [2] * 15
    made = with_test_set(images(labels), ("a", "b", "c"))
    assert torch.bincount(made.test.targets).tolist() == [2, 0, 3]
    assert torch.bincount(made.train.targets).tolist() == [8, 0, 12]
    assert not len(made.validation)
    small = with_test_set(images([0, 0, 1, 1]), ("a", "b"))
    assert (small.test.targets.tolist(), small.train.targets.tolist()) == ([0, 1], [0, 1]), "at least one of each"
    with pytest.raises(InputError, match="the class b has a single image"):
        with_test_set(images([0, 0, 1]), ("a", "b"))
    with pytest.raises(InputError, match="the data has a single image"):
        with_test_set(images(torch.zeros(1, 2)), ())


def test_validation_images_are_held_out_only_once():
    whole = splits(train=(0,) * 10 + (1,) * 10)
    made = with_validation(whole, 0.3, 0)
    assert torch.bincount(made.validation.targets).tolist() == [3, 3]
    assert torch.bincount(made.train.targets).tolist() == [7, 7]
    assert with_validation(made, 0.3, 0) is made
    assert with_validation(whole, 0.0, 0) is whole
    assert len(with_validation(whole, 0.01, 0).validation) == 1
    assert len(with_validation(whole, 0.9, 0).validation) == 18
    with pytest.raises(InputError, match="would hold out 19 of 20 training images, but at most 18"):
        with_validation(whole, 0.95, 0)


def test_limited_training_images_contain_every_class():
    whole = splits(train=(0,) * 10 + (1,) * 2)
    assert limited(whole, None, 0) is whole
    assert torch.bincount(limited(whole, 6, 0).train.targets).tolist() == [5, 1]
    assert torch.bincount(limited(whole, 2, 0).train.targets).tolist() == [1, 1]
    assert len(limited(whole, 12, 0).train) == 12
    for limit in (1, 13):
        with pytest.raises(InputError, match="Write a number from 2 to 12"):
            limited(whole, limit, 0)
    drawn = [limited(whole, 6, seed).train._index.tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_targets_are_read_on_demand():
    read = []
    lazy = LazyTargets(5, lambda number: read.append(number) or torch.tensor([number]), threads=2)
    chosen = lazy.selected(torch.tensor([4, 1]))
    assert (len(lazy), len(chosen), read) == (5, 2, [])
    assert chosen[1].item() == 1
    assert [each.item() for each in chosen.at([1, 0])] == [1, 4]
    decoded = Decoded(lazy, lambda number: torch.full((2, 3, 1), number, dtype=torch.uint8).numpy(), threads=2)
    view = View(decoded, torch.tensor([3, 0, 2]))
    assert view.targets_at(torch.tensor([2, 0])).tolist() == [[2], [3]]
    assert view.take(torch.tensor([2, 0]))[:, 0, 0, 0].tolist() == [2, 3]
    assert (view.size, view.channels, view.largest, len(view)) == ((2, 3), 1, 255, 3)
    kept = in_memory(view)
    assert kept.targets.tolist() == [[3], [0], [2]]
    assert kept.take(torch.arange(3))[:, 0, 1, 2].tolist() == [3, 0, 2]
    assert in_memory(kept) is kept
    assert bytes_in_memory(view) == 3 * 2 * 3
    assert bytes_in_memory(images([0, 1], dtype=torch.uint16)) == 2 * 8 * 9 * 3 * 2
    assert strata(view).tolist() == [0, 0, 0]
    assert strata(images([0, 1])).tolist() == [0, 1]
    assert images(torch.full((2, 4, 4), 7, dtype=torch.uint8)).targets_at(torch.tensor([1])).dtype == torch.int64
    mixed = Pixels(kept._pixels[:2], [torch.zeros(1), torch.zeros(2)])
    assert [len(each) for each in mixed.targets_at(torch.tensor([1, 0]))] == [2, 1], "of different shapes: a list"


@pytest.mark.parametrize("threads", [1, 3])
def test_decoded_images_are_checked_for_size_dtype_and_count(threads):
    def read(number):
        height = 3 if number == 6 else 2
        kind = torch.uint16 if number == 7 else torch.uint8
        return torch.full((height, 2, 1), number, dtype=kind).numpy()

    made = Decoded(None, read, threads, count=20)
    index = torch.tensor([*range(6), *range(8, 20)])
    assert made.take(index)[:, 0, 1, 1].tolist() == index.tolist()
    assert made.targets_at(index) is None
    with pytest.raises(InputError, match="the images differ in size: 2x2 and 2x3"):
        made.take(torch.tensor([0, 6]))
    with pytest.raises(InputError, match=r"\(the first has 8\)"):
        made.take(torch.tensor([0, 7]))
    with pytest.raises(InputError, match="a data set has no images"):
        Decoded(None, read)
