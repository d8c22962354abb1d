from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from tersor.core.errors import InputError
from tersor.data import Batches
from tersor.data.image_sets import Decoded, Pixels

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def some_images(count: int) -> Pixels:
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 8, 9, 3), dtype=torch.uint8, generator=draw)
    return Pixels(pixels, torch.arange(count) % 3)


def decoded(images: Pixels) -> Decoded:
    """The same images, but as if they had to be decoded."""
    return Decoded(images.labels, lambda number: images.take(torch.tensor([number]))[0].permute(1, 2, 0).numpy(), 2)


def batches(images, size=4, **options) -> Batches:
    return Batches(images, size, mean=MEAN, std=STD, **options)


def places(of: Batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in of]


def same(one: Batches, other: Batches) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)
        for a, b in pairs
    )


def test_without_shuffle_every_image_comes_once_in_order():
    of = batches(some_images(10))
    assert places(of) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(of) == 3


def test_images_are_taken_as_they_come_in_batches_but_never_augmented():
    images = some_images(10)
    [batch] = batches(images, 10)
    index = torch.tensor([7, 0, 7])
    taken = batches(images, 4, shuffle=True, augment="crop_flip").take(index)
    assert torch.equal(taken.images, batch.images[index])
    assert torch.equal(taken.labels, batch.labels[index])
    assert torch.equal(taken.index, index)


def test_what_the_network_gets():
    images = some_images(5)
    for batch in batches(images, 3):
        pixels = images.take(batch.index)
        slow = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(batch.images, slow)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.labels, images.labels[batch.index])


@given(
    count=st.integers(0, 40),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_the_processes_share_the_images(count, size, world, shuffle, epoch):
    assume(count == 0 or count >= world)
    assume(shuffle or size > 1 or count % world == 0)
    ranks = [batches(some_images(count), size, shuffle=shuffle, rank=rank, world=world) for rank in range(world)]
    for of in ranks:
        of.set_epoch(epoch)
    shares = [places(of) for of in ranks]
    assert {len(share) for share in shares} == {len(ranks[0])}
    assert all(0 < len(batch) <= size for share in shares for batch in share)
    seen = [place for share in shares for batch in share for place in batch]
    assert len(set(seen)) == len(seen)
    if shuffle and count >= size * world:
        assert len(seen) == count // (size * world) * size * world
        assert all(len(batch) == size for share in shares for batch in share)
    else:
        assert sorted(seen) == list(range(count))


def test_shuffle_keeps_the_small_batch_only_where_there_is_no_other():
    assert [len(batch) for batch in places(batches(some_images(11), 4, shuffle=True))] == [4, 4]
    assert [len(batch) for batch in places(batches(some_images(3), 4, shuffle=True))] == [3]


def test_seed_and_epoch_decide_everything():
    images = some_images(20)
    options = {"shuffle": True, "augment": "crop_flip"}
    one, other = batches(images, seed=3, **options), batches(images, seed=3, **options)
    for epoch in (0, 1, 7):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        torch.rand(epoch)  # what somebody else draws
        assert same(one, other)
        assert same(one, one)
    assert places(one) != places(batches(images, seed=3, **options))
    assert places(batches(images, seed=4, **options)) != places(batches(images, seed=3, **options))


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    list(batches(some_images(20), shuffle=True, augment="crop_flip"))
    assert torch.equal(torch.get_rng_state(), before)


def test_augmentation_changes_with_the_epoch_and_with_the_batch():
    images = Pixels(some_images(1).take(torch.zeros(64, dtype=torch.int64)).permute(0, 2, 3, 1), torch.zeros(64).long())
    of = batches(images, 32, augment="crop_flip")
    first, second = (batch.images for batch in of)
    assert not torch.equal(first, second)
    of.set_epoch(1)
    assert not torch.equal(next(iter(of)).images, first)


def test_processes_augment_differently():
    images = Pixels(some_images(1).take(torch.zeros(64, dtype=torch.int64)).permute(0, 2, 3, 1), torch.zeros(64).long())
    one, other = (next(iter(batches(images, 32, augment="flip", rank=rank, world=2))).images for rank in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shuffle", [False, True])
def test_decoding_ahead_changes_nothing(shuffle):
    images = some_images(23)
    options = {"shuffle": shuffle, "augment": "crop_flip", "seed": 5}
    assert same(batches(images, **options), batches(decoded(images), **options))


def test_leaving_early_leaves_no_thread():
    before = threading.active_count()
    for _ in batches(decoded(some_images(23))):
        break
    assert threading.active_count() == before


def test_an_error_while_decoding_ahead_arrives():
    def read(number):
        if number == 9:
            raise InputError("broken")
        return some_images(1).take(torch.tensor([0]))[0].permute(1, 2, 0).numpy()

    with pytest.raises(InputError, match="broken"):
        list(batches(Decoded(torch.zeros(12).long(), read, 2)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "batch_size is 0"),
        ({"augment": "crop"}, "unknown augmentation 'crop'.*crop_flip"),
        ({"world": 4}, "3 images for 4 processes"),
        ({"world": 2, "size": 1}, "3 images one by one for 2 processes"),
    ],
)
def test_impossible_batches(options, words):
    with pytest.raises(InputError, match=words):
        batches(some_images(3), **options)
