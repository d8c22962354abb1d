from __future__ import annotations

import os
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from tersor.core.errors import InputError
from tersor.data.decoding import SUFFIXES, ImageFormat, mask_of, pixels_of, read_file

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:200:20j, 0:200:30j], 90), axis=2).astype(np.uint8)


@pytest.mark.parametrize("suffix", [suffix for suffix in SUFFIXES if suffix != ".pgm"])
def test_every_format_is_read(suffix, tmp_path):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(SMOOTH).save(path)
    found = read_file(str(path), ImageFormat())
    assert found.shape == (20, 30, 3)
    assert found.dtype == np.uint8
    lossy = suffix in {".jpg", ".jpeg", ".webp", ".gif"}
    assert np.abs(found.astype(int) - SMOOTH).mean() <= (10 if lossy else 0)


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK"])
def test_every_pillow_mode_is_converted_to_rgb(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    assert np.array_equal(pixels_of(image, ImageFormat(), "it"), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bit_values_are_kept(tmp_path, channels):
    values = np.random.default_rng(0).integers(0, 2**16, (6, 4), dtype=np.uint16)
    path = tmp_path / "deep.png"
    Image.fromarray(values).save(path)
    found = read_file(str(path), ImageFormat(channels=channels))
    assert found.dtype == np.uint16
    assert np.array_equal(found, values[..., None].repeat(channels, 2))
    assert read_file(str(path), ImageFormat((3, 2), channels)).shape == (3, 2, channels)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "LA"])
def test_gray_images_have_one_channel(mode):
    image = Image.fromarray(PIXELS).convert(mode)
    assert np.array_equal(pixels_of(image, ImageFormat(channels=1), "it")[..., 0], np.asarray(image.convert("L")))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK"])
def test_four_channels_are_independent(mode):
    values = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    values[..., 3] = 0
    image = Image.frombytes(mode, (8, 8), values.tobytes())
    assert np.array_equal(pixels_of(image, ImageFormat(channels=4), "it"), values)
    small = pixels_of(image, ImageFormat((4, 4), 4), "it")
    for band in range(4):
        alone = Image.fromarray(values[..., band]).resize((4, 4), Image.Resampling.BILINEAR)
        assert np.array_equal(small[..., band], np.asarray(alone))


def test_without_crop_the_image_is_resized_to_both_sides():
    found = pixels_of(Image.fromarray(SMOOTH), ImageFormat((10, 10), crop=False), "it")
    assert np.array_equal(found, np.asarray(Image.fromarray(SMOOTH).resize((10, 10), Image.Resampling.BILINEAR)))
    assert not np.array_equal(found, pixels_of(Image.fromarray(SMOOTH), ImageFormat((10, 10)), "it"))


@pytest.mark.parametrize(
    ("image", "channels", "words"),
    [
        (torch.zeros(5, 4, 4, dtype=torch.uint8), 3, "5 channels, but channels is 3. Write channels: 5"),
        (Image.new("RGB", (4, 4)), 5, "channels is 5. Possible: .*1, 3, 4 channels"),
        (Image.new("F", (4, 4)), 3, "mode 'F'.*Possible: images of 8 or 16 bits"),
        (Image.fromarray(np.full((4, 4), 2**16, np.int32)), 3, "more than 16 bits"),
    ],
)
def test_an_impossible_number_of_channels_raises(image, channels, words):
    with pytest.raises(InputError, match=words):
        pixels_of(image, ImageFormat(channels=channels), "it")


def test_resizing_a_mask_adds_no_new_values():
    values = np.random.default_rng(0).choice(np.array([0, 7, 255], np.uint8), (9, 12))
    palette = Image.fromarray(values).convert("P")
    palette.putdata(values.flatten().tolist())
    for image in (Image.fromarray(values), palette, torch.from_numpy(values).long()):
        assert np.array_equal(mask_of(image, None, "it"), values)
        found = mask_of(image, (5, 7), "it")
        assert found.shape == (5, 7)
        assert {*found.flatten().tolist()} <= {0, 7, 255}


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("RGB", (4, 4)), "Pillow mode 'RGB'.*Convert colors to class indices"),
        (torch.zeros(3, 4, 4, dtype=torch.long), r"a mask \(3, 4, 4\)"),
        (torch.zeros(4, 4), "of float32"),
        (torch.full((4, 4), 256), "from 256 to 256"),
        (torch.full((4, 4), -1), "from -1 to -1"),
    ],
)
def test_masks_without_class_indices_raise(image, words):
    with pytest.raises(InputError, match=words):
        mask_of(image, None, "it")


@pytest.mark.parametrize("options", [(".jpg", {}), (".jpg", {"progressive": True}), (".png", {}), (".webp", {})])
def test_a_truncated_file_is_named_in_the_error(options, tmp_path):
    suffix, how = options
    whole = tmp_path / f"whole{suffix}"
    Image.fromarray(PIXELS).save(whole, **how)
    content = whole.read_bytes()
    path = tmp_path / f"cut{suffix}"
    for length in range(0, len(content) - 100, 40):
        path.write_bytes(content[:length])
        with pytest.raises(InputError, match=rf"cut\{suffix}' (is not an image|cannot be decoded)"):
            read_file(str(path), ImageFormat())


def test_corrupted_bytes_are_decoded_or_raise_an_input_error(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "broken"
    for suffix in (".jpg", ".png", ".bmp", ".gif", ".webp", ".ppm"):
        whole = tmp_path / f"whole{suffix}"
        Image.fromarray(PIXELS).save(whole)
        content = np.frombuffer(whole.read_bytes(), np.uint8)
        for _ in range(60):
            broken = content.copy()
            broken[random.integers(0, min(120, len(content)), 4)] = random.integers(0, 256, 4)
            path.write_bytes(broken.tobytes())
            try:
                assert read_file(str(path), ImageFormat((8, 8))).shape == (8, 8, 3)
            except InputError as error:
                assert "broken" in str(error)  # noqa: PT017  (either is right, and which one is up to the bytes)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_named_pipe_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png' does not exist or is not a regular file"):
        read_file(str(tmp_path / "pipe.png"), ImageFormat())


def test_a_missing_file_raises(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png' does not exist"):
        read_file(str(tmp_path / "gone.png"), ImageFormat())


def test_a_text_file_raises(tmp_path):
    path = tmp_path / "letter.jpg"
    path.write_text("Dear reader")
    with pytest.raises(InputError, match=r"letter\.jpg' is not an image"):
        read_file(str(path), ImageFormat())


@pytest.mark.parametrize("size", [(30, 20), (20, 30), (10, 10), (11, 57), (5, 40)])
def test_the_shorter_side_is_resized_and_the_center_is_kept(size):
    image = Image.new("RGB", size, (200, 100, 50))
    image.putpixel((0, 0), (0, 0, 0))
    found = pixels_of(image, ImageFormat((10, 10)), "it")
    assert found.shape == (10, 10, 3)
    width, height = size
    if width > height + 4:  # the corner is cropped off
        assert (found == (200, 100, 50)).all()
    slow = Image.fromarray(SMOOTH).resize((15, 10), Image.Resampling.BILINEAR).crop((2, 0, 12, 10))
    close = pixels_of(Image.fromarray(SMOOTH), ImageFormat((10, 10)), "it").astype(int) - np.asarray(slow)
    assert np.abs(close).max() <= 8  # half a pixel of the centre


def test_a_large_jpeg_is_decoded_at_a_smaller_scale_with_nearly_the_same_pixels(tmp_path):
    path = tmp_path / "large.jpg"
    Image.fromarray(PIXELS).resize((900, 600), Image.Resampling.BICUBIC).save(path, quality=95)
    with Image.open(path) as image:
        whole = pixels_of(image, ImageFormat((32, 32)), "it").astype(int)
    assert np.abs(read_file(str(path), ImageFormat((32, 32))) - whole).max() <= 3


def test_tensors_are_converted():
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    assert np.array_equal(pixels_of(tensor, ImageFormat(), "it"), PIXELS)
    assert np.array_equal(pixels_of(tensor[:1], ImageFormat(), "it"), PIXELS[:, :, :1].repeat(3, axis=2))
    assert pixels_of(tensor, ImageFormat((7, 7)), "it").shape == (7, 7, 3)


@pytest.mark.parametrize("image", [torch.zeros(3, 4, 4), torch.zeros(4, 4, dtype=torch.uint8), "a path", None])
def test_other_types_raise(image):
    with pytest.raises(InputError, match=r"image 3 .*Pass a PIL image or a uint8"):
        pixels_of(image, ImageFormat(), "image 3")


def png_of(width, height, pixels=b""):
    """A PNG whose header declares the given size."""

    def chunk(kind, content):
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    head = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(pixels) if pixels else zlib.compress(bytes(100_000), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)])
@pytest.mark.parametrize("image_size", [None, 8])
def test_a_decompression_bomb_is_rejected_before_it_is_decompressed(tmp_path, size, image_size):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_of(*size))
    with pytest.raises(InputError, match=r"bomb\.png'.*(smaller|Replace)"):
        read_file(str(path), ImageFormat(image_size and (image_size, image_size)))


def test_a_decompression_bomb_warning_raised_as_an_error_becomes_an_input_error(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_of(10_000, 10_000))
    with warnings.catch_warnings(action="error"), pytest.raises(InputError, match=r"large\.png'.*smaller"):
        read_file(str(path), ImageFormat())


@pytest.mark.parametrize(
    "start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.7\n", b"8BPS", b"<svg/>"]
)
def test_a_script_with_the_name_of_an_image_is_not_executed(tmp_path, start, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)
    path = tmp_path / "image.png"
    path.write_bytes(start + b"(x) print showpage\n")
    with pytest.raises(InputError, match=r"image\.png' is not an image in a supported format"):
        read_file(str(path), ImageFormat())


def test_a_jpeg_with_several_pictures_from_a_phone_is_read(tmp_path):
    path = tmp_path / "phone.jpg"
    Image.fromarray(SMOOTH).save(path, "MPO", save_all=True, append_images=[Image.fromarray(SMOOTH)])
    assert read_file(str(path), ImageFormat()).shape == (20, 30, 3)
