"""Out-of-memory and disk errors become one message; other errors propagate."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from tersor.core.errors import InputError
from tersor.core.resources import enough_memory, less_memory, writable


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 99 bytes."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_out_of_memory_errors_suggest_a_batch_size(error):
    words = r"not enough memory .*batch_size is 128. Write a smaller one. .*write batch_size: 64 and accumulate: 6"
    with pytest.raises(InputError, match=words) as raised, enough_memory(less_memory("recipe", 128, 3)):
        raise error
    assert "\n" not in str(raised.value)


def test_a_batch_size_of_one_suggests_smaller_images():
    assert "smaller images" in less_memory("recipe", 1, 4)


@pytest.mark.parametrize(("origin", "words"), [("call", "Pass a loader"), ("search", "`--image-size`")])
def test_without_a_recipe_the_remedy_names_no_key_of_one(origin, words):
    remedy = less_memory(origin, 128, 1)
    assert words in remedy
    assert "batch_size" not in remedy


def test_a_batch_size_is_halved_and_accumulation_is_doubled():
    of_recipe = lambda size: less_memory("recipe", size, 1)  # noqa: E731
    assert "To keep the same number of images per step, write batch_size: 4 and accumulate: 2." in of_recipe(8)
    assert "To keep about the same number of images per step, write batch_size: 4" in of_recipe(9)


def test_an_out_of_memory_error_of_torch_is_recognized():
    with pytest.raises(InputError, match="not enough memory"), enough_memory("."):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_propagate(error):
    with pytest.raises(type(error)), enough_memory("."):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_error_for_any_file_raises_one_error(number):
    words = r"runs/out could not be written.*Free disk space and check the permissions"
    with pytest.raises(InputError, match=words), writable(Path("runs/out")):
        raise OSError(number, "words", "/tmp/elsewhere")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "words", "runs/.out.1a2b3c4d.partial/model.onnx"), shutil.Error([("a", "b", "no room")])],
)
def test_an_error_for_a_temporary_file_raises_one_error(error):
    with pytest.raises(InputError, match="could not be written"), writable(Path("runs/out")):
        raise error


def test_errors_of_other_files_propagate():
    with pytest.raises(FileNotFoundError), writable(Path("runs/out")):
        Path("nowhere/weights.bin").read_bytes()
