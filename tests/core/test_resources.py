"""What the machine lacks is one message, and everything else stays what it was."""

import errno
import shutil
from pathlib import Path

import pytest
import torch

from tersor.core.errors import InputError
from tersor.core.resources import enough_memory, smaller_batch, writable


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
def test_too_little_memory_is_told_with_what_to_write(error):
    words = r"not enough memory: .*batch_size is 128: lower it.*batch_size: 64 with accumulate: 2"
    with pytest.raises(InputError, match=words) as told, enough_memory(smaller_batch(128, 1)):
        raise error
    assert "\n" not in str(told.value)


def test_a_batch_of_one_cannot_be_lowered():
    assert "smaller images" in smaller_batch(1, 4)


def test_torch_says_it_in_words_that_are_known():
    with pytest.raises(InputError, match="not enough memory"), enough_memory("."):
        torch.empty(2**60, dtype=torch.uint8)


@pytest.mark.parametrize("error", [RuntimeError("shapes"), ValueError("memory"), KeyboardInterrupt()])
def test_other_errors_are_left_alone(error):
    with pytest.raises(type(error)), enough_memory("."):
        raise error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_refuses_is_told_wherever_the_file_lies(number):
    words = r"runs/out could not be written.*Nothing is left half-written"
    with pytest.raises(InputError, match=words), writable(Path("runs/out")):
        raise OSError(number, "words", "/tmp/elsewhere")


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EACCES, "words", "runs/.out.1a2b3c4d.partial/model.onnx"), shutil.Error([("a", "b", "no room")])],
)
def test_what_is_written_for_the_folder_is_told(error):
    with pytest.raises(InputError, match="could not be written"), writable(Path("runs/out")):
        raise error


def test_a_file_of_the_user_is_left_alone():
    with pytest.raises(FileNotFoundError), writable(Path("runs/out")):
        Path("nowhere/weights.bin").read_bytes()
