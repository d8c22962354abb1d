from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from tersor.core.errors import InputError
from tersor.data.datasets import from_name
from tersor.data.decoding import ImageFormat


def everything(images) -> torch.Tensor:
    return images.take(torch.arange(len(images)))


def test_digits_are_loaded():
    splits = from_name("digits", None, ImageFormat())
    assert splits.classes == tuple("0123456789")
    assert (len(splits.train), len(splits.test), splits.train.size) == (1438, 359, (8, 8))
    assert min(torch.bincount(splits.test.targets)) >= 34
    pixels = torch.cat([everything(splits.train), everything(splits.test)])
    assert torch.equal(pixels[:, 0], pixels[:, 2])
    found = {
        (image.numpy().tobytes(), int(label))
        for image, label in zip(pixels[:, 0], torch.cat([splits.train.targets, splits.test.targets]), strict=True)
    }
    original = load_digits()
    for image, label in zip(original.images, original.target, strict=True):
        assert (np.rint(image / 16 * 255).astype(np.uint8).tobytes(), int(label)) in found


def test_the_test_digits_are_the_same_on_every_machine():
    """Otherwise published accuracies would not be comparable."""
    pixels = everything(from_name("digits", None, ImageFormat()).test).contiguous().numpy().tobytes()
    assert hashlib.sha256(pixels).hexdigest().startswith("fbac2d5fa64835e2")


def test_digits_can_be_enlarged():
    assert from_name("digits", None, ImageFormat((16, 16))).test.size == (16, 16)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "unknown data name 'digit'. Did you mean 'digits'"),
        ("CIFAR", "Did you mean 'cifar10.*package.module:function"),
        ("", "unknown data name"),
        ("no/such/folder", "there is no folder 'no/such/folder' in"),
    ],
)
def test_unknown_names_raise(name, words):
    with pytest.raises(InputError, match=words):
        from_name(name, None, ImageFormat())


def test_a_root_for_digits_raises(tmp_path):
    with pytest.raises(InputError, match="no root"):
        from_name("digits", tmp_path, ImageFormat())


def test_torchvision_sets_need_a_root():
    with pytest.raises(InputError, match=r"'CIFAR10' needs the folder .*load\(name='CIFAR10', root=FOLDER\)\."):
        from_name("cifar10", None, ImageFormat())


@pytest.mark.parametrize("name", ["CIFAR10", "CIFAR100", "FashionMNIST", "MNIST", "SVHN", "STL10", "USPS", "ImageNet"])
def test_the_error_for_a_missing_dataset_explains_the_download(name, tmp_path):
    words = "Put ILSVRC2012" if name == "ImageNet" else rf"python -c .* import {name}; .*download=True"
    with pytest.raises(InputError, match=words):
        from_name(name, tmp_path, ImageFormat())
    assert list(tmp_path.rglob("*.tar*")) == []


def test_a_torchvision_dataset_is_read_from_its_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = {}
    for which, count in (("train", 30), ("t10k", 12)):
        pixels[which] = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = struct.pack(">iiii", 0x00000803, count, 28, 28)
        (raw / f"{which}-images-idx3-ubyte").write_bytes(header + pixels[which].tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{which}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x00000801, count) + labels.tobytes())
    splits = from_name("fashionmnist", tmp_path, ImageFormat())
    assert splits.classes[0] == "T-shirt/top"
    assert splits.train.targets.tolist() == [number % 10 for number in range(30)]
    assert np.array_equal(everything(splits.test)[:, 1], pixels["t10k"])


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A function that writes a module, and returns the data from its function `make`."""
    numbers = iter(range(100))

    def data_of(code: str, root=None, size=None):
        module = f"own_data_{tmp_path.name.replace('-', '_')}_{next(numbers)}"
        (tmp_path / f"{module}.py").write_text(
            "import torch\nfrom PIL import Image\n"
            "image = torch.arange(48, dtype=torch.uint8).view(3, 4, 4)\n"
            f"picture = Image.new('RGB', (5, 5), (1, 2, 3))\n{code}\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        return from_name(f"{module}:make", root, ImageFormat(size))

    return data_of


def test_a_function_can_return_train_and_test_sets(own):
    splits = own("def make(): return [(image, 0), (image.flip(2), 1), (image, 2)], [(image, 1)]")
    assert splits.classes == ("0", "1", "2")
    assert splits.train.targets.tolist() == [0, 1, 2]
    assert torch.equal(everything(splits.train)[1], torch.arange(48, dtype=torch.uint8).view(3, 4, 4).flip(2))


def test_a_function_can_accept_root_and_return_pil_images(own, tmp_path):
    splits = own("def make(root): return [(picture, len(root)), (picture, 0)], [(picture, 0)]", tmp_path, (3, 3))
    assert splits.train.targets.tolist() == [len(str(tmp_path)), 0]
    assert everything(splits.test)[0, :, 2, 2].tolist() == [1, 2, 3]
    assert splits.test.size == (3, 3)


def test_listed_labels_are_used_without_decoding(own):
    code = """
class Set(torch.utils.data.Dataset):
    targets, classes, asked = [1, 0, 1], ["cat", "dog"], []
    def __len__(self): return 3
    def __getitem__(self, number):
        self.asked.append(number)
        return image, self.targets[number]
def make(): return Set(), Set()
"""
    splits = own(code)
    assert splits.classes == ("cat", "dog")
    assert splits.train.targets.tolist() == [1, 0, 1]


def test_listed_labels_are_checked_against_the_items(own):
    code = """
class Set(torch.utils.data.Dataset):
    targets = [1, 0, 1]
    def __len__(self): return 3
    def __getitem__(self, number): return image, 1
def make(): return Set(), Set()
"""
    with pytest.raises(InputError, match="image 1 has label 1, but had label 0 before"):
        everything(own(code).train)


def test_splits_from_a_function_are_unchanged(own):
    code = """
from tersor.data import Splits
from tersor.data.image_sets import Pixels
some = Pixels(torch.zeros(4, 2, 2, 3, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
made = Splits(some, some, some, ("cat", "dog"), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0))
def make(): return made
"""
    splits = own(code)
    assert splits.mean == (0.1, 0.2, 0.3)
    assert len(splits.validation) == 4


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def make(): return 3", "returned a int.*Return a tersor.data.Splits, a pair"),
        ("def make(): return [], [], []", "returned a tuple of length 3"),
        ("def make(): return [], [(image, 0)]", "training set: the list is empty"),
        ("def make(): return [(image, 0)], iter([])", "test set: the list_iterator .* has no length"),
        (
            "from torch.utils.data import DataLoader\ndef make(): return DataLoader([(image, 0)]), [(image, 0)]",
            "training set: a DataLoader is given. Give its data set",
        ),
        ("def make(): return [(image, 0)], [image]", "test set: item 0 is a Tensor"),
        ("def make(): return [(image, 0), (image, 0.5)], [(image, 0)]", "label of item 1 is a float"),
        ("def make(): return [(image, 0)], [(image, torch.zeros(3))]", "label of item 0 is a Tensor"),
        ("def make(): return [(image, 'cat')], [(image, 0)]", "target of item 0 is a str"),
        ("def make(): return {'train': [(image, 0)]}", "has the sets train. Possible: a dict of train, test"),
        (
            "def make(): return [(image / 255, 0)], [(image, 0)]",
            r"image 0 is a tensor .* of torch.float32.*: \(image \* 255\)\.round\(\)",
        ),
        ("def make(width): return None", "cannot be called"),
        ("def mak(): return None", "has no 'make'. Did you mean 'mak'"),
    ],
)
def test_invalid_functions_raise(own, code, words):
    with pytest.raises(InputError, match=words):
        own(code)
