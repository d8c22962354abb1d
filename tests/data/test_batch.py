"""The first images of a user's data can be read without consuming them."""

import itertools

import pytest
import torch

from tersor.core.errors import InputError
from tersor.data.batch import first_batch
from tersor.training.context import AttachContext

BATCHES = [torch.rand(0, 3, 4, 4), torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4)]


@pytest.mark.parametrize("once", [False, True])
def test_first_batch_does_not_consume_the_data(once):
    data = AttachContext(data=iter(BATCHES) if once else BATCHES).data
    for _ in range(2):
        assert torch.equal(first_batch(data, "ptq"), BATCHES[1]), "the first batch that is not empty"
    assert [len(batch) for batch in data] == [0, 2, 3]
    assert len(list(data)) == (0 if once else 3)


def test_first_batch_reads_no_more_of_endless_data_than_it_needs():
    read = []
    data = AttachContext(data=(read.append(number) or BATCHES[1] for number in itertools.count())).data
    first_batch(data, "ptq")
    assert read == [0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "ptq needs images"),
        ([], "ptq needs images, and the data contains none"),
        (BATCHES[:1], "ptq needs images, and the data contains none"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], r"torch\.uint8.*floating-point"),
    ],
)
def test_data_without_images_raises(data, words):
    with pytest.raises(InputError, match=words):
        first_batch(data, "ptq")
