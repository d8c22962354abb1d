"""Draw test, validation and limited training images at random, stratified by class; concatenate two sets."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tersor.core.errors import InputError
from tersor.data.image_sets import Images, Pixels, Splits, View, class_numbers, strata
from tersor.data.stratified import generator, stratified

TEST_SHARE = 0.2
"""Fraction of the images that becomes the test set where the data has none."""

_TEST_SEED = 0
_VALIDATION, _LIMIT = 0, 1  # streams of random numbers


def none_of(images: Images) -> View:
    """An empty set."""
    return View(images, torch.arange(0))


def with_test_set(images: Images, classes: tuple[str, ...]) -> Splits:
    """Split off a fifth of every class as the test set, the same for every seed.

    Raises:
        InputError: a class has a single image.
    """
    of_class = strata(images)
    counts = torch.bincount(of_class)
    if int(counts[counts > 0].min()) < 2:
        lone = classes[int((counts == 1).nonzero()[0])] if class_numbers(images) is not None else None
        raise InputError(
            ("the data has" if lone is None else f"the class {lone} has")
            + " a single image, so no test image can be split off. Add images, or divide them into train and test."
        )
    count = max(int((counts > 0).sum()), round(TEST_SHARE * len(images)))
    test, train = stratified(of_class, count, generator(_TEST_SEED), at_least=1, leave=1)
    return Splits(View(images, train), none_of(images), View(images, test), classes, test_is_drawn=True)


def drawn_test_set(splits: Splits) -> str | None:
    """A line that says how many images became the test set; None if the data has a test set of its own."""
    if not splits.test_is_drawn:
        return None
    of = "each class" if class_numbers(splits.test) is not None else "the data"
    return f"the data has no test set of its own: {len(splits.test)} images, a fifth of {of}, are used as the test set"


def undivided(splits: Splits) -> Images:
    """All images of data without a test set of its own and without validation images."""
    if isinstance(splits.train, View) and isinstance(splits.test, View):
        return splits.train.joined(splits.test)
    both = joined(splits.train, splits.test)
    assert both is not None
    return both


def with_validation(splits: Splits, share: float, seed: int) -> Splits:
    """Hold out this share of the training images, unless there are validation images.

    Raises:
        InputError: a class would have no training image left.
    """
    if len(splits.validation) or not share:
        return splits
    labels = strata(splits.train)
    count = max(1, round(share * len(labels)))
    most = len(labels) - int((torch.bincount(labels) > 0).sum())
    if count > most:
        raise InputError(
            f"validation {share} would hold out {count} of {len(labels)} training images, but at most {most} are "
            "possible: at least one image of every class must remain for training. Add images, or write "
            f"{'a smaller validation (0 for none' if most else 'validation: 0 (none'}; tersor compress needs more than "
            "0)."
        )
    held_out, rest = stratified(labels, count, generator(seed, _VALIDATION), leave=1)
    return replace(splits, train=View(splits.train, rest), validation=View(splits.train, held_out))


def with_test_images_for_validation(splits: Splits, seed: int, *, by_class: bool) -> Splits:
    """Half of the test images, of each class if `by_class`, become the validation images; the rest are for tests."""
    draw, half = generator(seed), len(splits.test) // 2
    if by_class:
        chosen, rest = stratified(splits.test.targets, half, draw)
    else:
        chosen, rest = torch.randperm(len(splits.test), generator=draw).tensor_split([half])
    return replace(splits, validation=View(splits.test, chosen), test=View(splits.test, rest))


def limited(splits: Splits, limit: int | None, seed: int) -> Splits:
    """Draw `limit` training images; all for None.

    Raises:
        InputError: there are fewer, or more classes than `limit`.
    """
    if limit is None:
        return splits
    labels = strata(splits.train)
    classes = int((torch.bincount(labels) > 0).sum())
    if not classes <= limit <= len(labels):
        of_classes = "" if class_numbers(splits.train) is None else f" of {classes} classes"
        raise InputError(
            f"limit is {limit}, but there are {len(labels)} training images (without validation images){of_classes}. "
            f"Write a number from {classes} to {len(labels)}, or leave limit out."
        )
    drawn, _ = stratified(labels, limit, generator(seed, _LIMIT), at_least=1)
    return replace(splits, train=View(splits.train, drawn))


def joined(first: Images, second: Images) -> Pixels | None:
    """Concatenate two sets of images; None unless both are in memory."""
    if not isinstance(first, Pixels) or not isinstance(second, Pixels):
        return None
    targets, more = first.targets, second.targets
    if isinstance(targets, Tensor) and isinstance(more, Tensor):
        targets = torch.cat([targets, more])
    elif targets is not None and more is not None:
        targets = [*targets, *more]
    pixels = [each.take(torch.arange(len(each))).permute(0, 2, 3, 1) for each in (first, second)]
    return Pixels(torch.cat(pixels), targets)
