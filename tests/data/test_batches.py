from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms import v2

from tersor.core.errors import InputError
from tersor.data import Batches
from tersor.data.image_sets import Decoded, Pixels
from tersor.data.stratified import generator
from tersor.training.attachment import Attachment
from tersor.training.loop import fit
from tersor.training.options import Training

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def some_images(count: int) -> Pixels:
    draw = torch.Generator().manual_seed(count)
    pixels = torch.randint(0, 256, (count, 8, 9, 3), dtype=torch.uint8, generator=draw)
    return Pixels(pixels, torch.arange(count) % 3)


def decoded(images: Pixels) -> Decoded:
    """The same images, decoded on demand."""
    return Decoded(images.targets, lambda number: images.take(torch.tensor([number]))[0].permute(1, 2, 0).numpy(), 2)


def batches(images, size=4, **options) -> Batches:
    return Batches(images, size, mean=MEAN, std=STD, **options)


def places(of: Batches) -> list[list[int]]:
    return [batch.index.tolist() for batch in of]


def same(one: Batches, other: Batches) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and torch.equal(a.index, b.index)
        for a, b in pairs
    )


def test_without_shuffle_every_image_is_returned_once_in_order():
    of = batches(some_images(10))
    assert places(of) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(of) == 3


def test_take_normalizes_and_does_not_augment():
    images = some_images(10)
    [batch] = batches(images, 10)
    index = torch.tensor([7, 0, 7])
    taken = batches(images, 4, shuffle=True, augment="crop_flip").take(index)
    assert torch.equal(taken.images, batch.images[index])
    assert torch.equal(taken.targets, batch.targets[index])
    assert torch.equal(taken.index, index)


def test_images_are_normalized():
    images = some_images(5)
    for batch in batches(images, 3):
        pixels = images.take(batch.index)
        slow = (pixels / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        torch.testing.assert_close(batch.images, slow)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(batch.targets, images.targets[batch.index])


@given(
    count=st.integers(0, 40),
    size=st.integers(1, 9),
    world=st.integers(1, 4),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_processes_get_disjoint_shares_of_the_images(count, size, world, shuffle, epoch):
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


def test_shuffle_drops_an_incomplete_batch_unless_it_is_the_only_one():
    assert [len(batch) for batch in places(batches(some_images(11), 4, shuffle=True))] == [4, 4]
    assert [len(batch) for batch in places(batches(some_images(3), 4, shuffle=True))] == [3]


def test_seed_and_epoch_determine_the_batches():
    images = some_images(20)
    options = {"shuffle": True, "augment": "crop_flip"}
    one, other = batches(images, seed=3, **options), batches(images, seed=3, **options)
    for epoch in (0, 1, 7):
        one.set_epoch(epoch)
        other.set_epoch(epoch)
        torch.rand(epoch)  # other draws from the global generator
        assert same(one, other)
        assert same(one, one)
    assert places(one) != places(batches(images, seed=3, **options))
    assert places(batches(images, seed=4, **options)) != places(batches(images, seed=3, **options))


def test_the_global_generator_is_not_used():
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
def test_decoding_ahead_does_not_change_the_batches(shuffle):
    images = some_images(23)
    options = {"shuffle": shuffle, "augment": "crop_flip", "seed": 5}
    assert same(batches(images, **options), batches(decoded(images), **options))


CROPS = [{"RandomCrop": {"size": (8, 9), "padding": 2}}, "RandomHorizontalFlip"]


def jittered(images):
    """A user's function on whole batches."""
    return (images.float() * (0.5 + torch.rand(len(images), 1, 1, 1) / 2)).to(torch.uint8)


@pytest.fixture(params=["list", "function", "callable", "transform"])
def transform(request):
    """Each way to define a custom augmentation."""
    return {
        "list": CROPS,
        "function": f"{__name__}:jittered",
        "callable": jittered,
        "transform": v2.RandomResizedCrop((8, 9), antialias=True),
    }[request.param]


def test_transforms_depend_on_seed_epoch_and_batch_only(transform):
    images = Pixels(some_images(1).take(torch.zeros(16, dtype=torch.int64)).permute(0, 2, 3, 1), torch.zeros(16).long())
    options = {"shuffle": True, "augment": transform, "seed": 3}
    one, lazy = batches(images, 8, **options), batches(decoded(images), 8, **options)
    one.set_epoch(2)
    lazy.set_epoch(2)
    first, second = one
    torch.rand(5)  # other draws of the same process
    assert same(one, lazy)
    assert torch.equal([*one][1].images, second.images), "a resumed epoch skips the first batch"
    assert not torch.equal(first.images, second.images)
    assert len(first.images.flatten(1).unique(dim=0)) > 4, "images of a batch are augmented differently"
    assert first.images.is_contiguous(memory_format=torch.channels_last)
    other = next(iter(batches(images, 8, rank=1, world=2, **options)))
    assert not torch.equal(other.images, first.images)


@pytest.mark.parametrize("images", [some_images(12), decoded(some_images(12))])
def test_transforms_do_not_use_the_random_numbers_of_the_training(transform, images):
    torch.manual_seed(0)
    expected = [torch.rand(3) for _ in range(3)]
    alone = [*batches(images, augment=transform)]
    torch.manual_seed(0)
    for batch, before, numbers in zip(batches(images, augment=transform), alone, expected, strict=True):
        assert torch.equal(batch.images, before.images)
        assert torch.equal(torch.rand(3), numbers)


class Snapshots:
    """Keep every snapshot; stop the training after `until` steps."""

    every, last = 1, "memory"

    def __init__(self, until=None, resume_state=None):
        self.until, self.resume_state, self.kept = until, resume_state, {}

    def save(self, step, tensors):
        self.kept[step] = tensors
        if step == self.until:
            raise KeyboardInterrupt


def test_resumed_training_with_transforms_is_bit_identical(transform):
    def trained(checkpointer):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.Flatten(), nn.Linear(168, 3))
        source = batches(decoded(some_images(20)), shuffle=True, augment=transform)
        return fit(Attachment(model), source, Training(), steps=12, checkpointer=checkpointer) and model.state_dict()

    whole, stopped = trained(Snapshots()), Snapshots(until=7)
    with pytest.raises(KeyboardInterrupt):
        trained(stopped)
    resumed = trained(Snapshots(resume_state=(7, stopped.kept[7])))
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())


def test_random_crops_equal_those_of_torchvision():
    [batch] = batches(some_images(6), 6, augment=CROPS, seed=1)
    slow = v2.Compose([v2.RandomCrop((8, 9), padding=2), v2.RandomHorizontalFlip()])
    with torch.random.fork_rng():
        torch.manual_seed(generator(1, 0, 1, 0, 0).initial_seed())
        crops = torch.stack([slow(image) for image in some_images(6).take(torch.arange(6))])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    torch.testing.assert_close(batch.images, (crops / 255 - mean) / std)


def test_transforms_with_nested_transforms_and_dtypes():
    noise = [
        {"ToDtype": {"dtype": "float32", "scale": True}},
        "GaussianNoise",
        {"ToDtype": {"dtype": "uint8", "scale": True}},
    ]
    augment = [{"RandomApply": {"transforms": noise, "p": 1.0}}]
    [plain], [noisy] = batches(some_images(4)), batches(some_images(4), augment=augment)
    assert (plain.images != noisy.images).float().mean() > 0.5


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (["RandomCrob"], r"torchvision.transforms.v2 has no transform 'RandomCrob'. Did you mean 'RandomCrop'"),
        (["InterpolationMode"], "has no transform"),
        ([{"RandomCrop": {"size": 8, "pad": 4}}], "RandomCrop does not accept.*'pad'.*Possible: size, padding"),
        (["RandomCrop"], "RandomCrop does not accept {}: .*'size'"),
        ([{"RandomRotation": {"degrees": -1}}], "RandomRotation does not accept"),
        ([{"RandomCrop": {"size": 40}}], "RandomCrop.* failed: Required crop size"),
        ([{"Normalize": {"mean": [0.5], "std": [0.5]}}], "Normalize.* failed: .*float"),
        (
            [{"Resize": {"size": [4, 4]}}],
            r"returned a tensor \(3, 4, 4\) of torch.uint8 for images \(3, 8, 9\).*image_size",
        ),
        ([{"ToDtype": {"dtype": "float32"}}], "of torch.float32 for images .*normalized after it"),
        ([], r"augment is \[\]. Possible: none, flip, crop_flip; package.module:function; or a list"),
        ([{"RandomCrop": {"size": 8}, "Resize": {"size": 8}}], "has the entry"),
        ([3], "has the entry 3"),
        (lambda images: images[:, :1], r"returned a tensor \(1, 1, 8, 9\)"),
        (lambda images: images.numpy(), "returned an object of type ndarray"),
        (f"{__name__}:jitter", "has no 'jitter'. Did you mean 'jittered'"),
        ("crop", "unknown augmentation 'crop'.*package.module:function"),
    ],
)
def test_invalid_transforms_raise(augment, words):
    with pytest.raises(InputError, match=words):
        batches(some_images(3), augment=augment)


def test_leaving_the_loop_early_leaves_no_thread():
    before = threading.active_count()
    for _ in batches(decoded(some_images(23))):
        break
    assert threading.active_count() == before


def test_errors_while_decoding_ahead_are_raised():
    def read(number):
        if number == 9:
            raise InputError("broken")
        return some_images(1).take(torch.tensor([0]))[0].permute(1, 2, 0).numpy()

    with pytest.raises(InputError, match="broken"):
        list(batches(Decoded(torch.zeros(12).long(), read, 2)))


@pytest.mark.parametrize(("channels", "dtype"), [(1, torch.uint8), (4, torch.uint8), (3, torch.uint16)])
def test_images_with_other_channels_and_bit_depths_are_normalized(channels, dtype):
    draw = torch.Generator().manual_seed(0)
    largest = torch.iinfo(dtype).max
    pixels = torch.randint(0, largest + 1, (6, 8, 9, channels), generator=draw).to(dtype)
    mean, std = (torch.rand(channels, generator=draw) + 0.1 for _ in range(2))
    images = Pixels(pixels, None)
    [batch] = Batches(images, 6, mean=mean.tolist(), std=std.tolist())
    expected = (pixels.double() / largest - mean) / std
    torch.testing.assert_close(batch.images.double(), expected.permute(0, 3, 1, 2), atol=1e-4, rtol=1e-4)
    assert batch.targets is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": 0}, "batch_size is 0"),
        ({"augment": "crop"}, "unknown augmentation 'crop'.*crop_flip"),
        ({"world": 4}, "4 processes need at least 4 images; given: 3"),
        ({"world": 2, "size": 1}, "3 images cannot be divided evenly among 2 processes"),
    ],
)
def test_invalid_batch_options_raise(options, words):
    with pytest.raises(InputError, match=words):
        batches(some_images(3), **options)
