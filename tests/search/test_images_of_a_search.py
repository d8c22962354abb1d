"""The images of a search: their number of channels and their normalization."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from recorded_progress import RecordedProgress
from tersor import cli
from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS
from tersor.data import load
from tersor.pipeline.setup import prepare
from tersor.search.candidate import Candidate
from tersor.search.request import Request, experiment_of
from tersor.search.workbench import Workbench


def gray_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight gray images of 16x16 pixels in two classes, in train and in test."""
    path = tmp_path_factory.mktemp("gray")
    for number in range(16):
        place = path / ("train", "test")[number % 2] / str(number // 2 % 2)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16), 16 * number, np.uint8)).save(place / f"{number}.png")
    return path


def request(data, **options):
    standard = {"weights": None, "runtime": "onnxruntime", "students": (), "pixels": (), "augment": None}
    standard |= {"limit": None, "seed": 0, "task": "classification"}
    return Request(**{"model": gray_net(), "data": data, **standard, **options})


def test_gray_images_are_read_with_one_channel(folder):
    progress = RecordedProgress()
    experiment = experiment_of(request(folder, channels=1, mean=(0.4,), std=(0.2,), image_size=8), progress)
    assert "normalization: mean 0.4, std 0.2 (given)" in progress.lines
    assert (experiment.data.train.channels, experiment.data.train.size) == (1, (8, 8))
    assert (experiment.data.mean, experiment.data.std) == ((0.4,), (0.2,))
    source = experiment.recipe.data
    assert (source.channels, source.mean, source.std, source.image_size) == (1, (0.4,), (0.2,), 8), "for `tersor run`"


def test_the_error_for_a_gray_network_on_rgb_images_names_the_option(folder):
    with pytest.raises(InputError, match=r"It takes images \(N, 1, H, W\).*--channels 1 for `tersor compress`"):
        experiment_of(request(folder), NO_PROGRESS)


def test_images_from_a_function_keep_their_channels(folder, monkeypatch):
    images = load(folder=folder, channels=1, validation=0.25)
    monkeypatch.setattr("tersor.data.datasets.import_function", lambda _: lambda: images)
    assert experiment_of(request("my_data:gray"), NO_PROGRESS).recipe.data.channels == 1
    with pytest.raises(InputError, match=r"1 channel, but channels is 3. Write channels: 1 in a recipe"):
        experiment_of(request("my_data:gray", channels=3), NO_PROGRESS)
    with pytest.raises(InputError, match=r"mean is \[0.5, 0.5\]. Write 1 number in"):
        experiment_of(request("my_data:gray", mean=(0.5, 0.5), std=(0.5, 0.5)), NO_PROGRESS)


def test_image_options_raise_for_images_that_are_already_loaded(folder):
    images, progress = load(folder=folder, channels=1, validation=0.25, mean=[0.5], std=[0.25]), RecordedProgress()
    assert experiment_of(request(images), progress).recipe.data.channels == 1
    assert "normalization: mean 0.5, std 0.25 (from the data)" in progress.lines
    with pytest.raises(InputError, match=r"channels, image_size cannot be used .* tersor.data.load"):
        request(images, channels=1, image_size=8)


def test_the_included_students_accept_gray_images(folder, tmp_path):
    experiment = experiment_of(request(folder, channels=1), NO_PROGRESS)
    bench = Workbench(experiment, {"wide_plain_8": None}, tmp_path, NO_PROGRESS)
    assert bench.student("wide_plain_8")(torch.zeros(1, 1, 16, 16)).shape == (1, 2)
    recipe = bench.recipe(Candidate("wide_plain_8"), experiment.recipe.stages)
    student, progress = recipe.model_copy(update={"teacher": None}), RecordedProgress()
    assert prepare(student, model=None, data=None, progress=progress).model.stem[0].conv.in_channels == 1
    assert "(computed from the training images)" in "".join(progress.lines)


def test_a_name_that_is_neither_a_dataset_nor_a_folder_raises(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"unknown data name 'dta'.* There is no folder 'dta'\."):
        experiment_of(request("dta"), NO_PROGRESS)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cars").mkdir()
    with pytest.raises(InputError, match=r"To read the folder 'cars', write folder: cars\."):
        load(name="cars")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-drop", "2%"], "'2%' is not a number of points. Write a number such as 2."),
        (["--mean", "0.4;0.5"], "--mean is '0.4;0.5'. Write numbers with commas between them."),
        (["--image-size", "1.5"], "--image-size is '1.5'. Write pixels: 224, or height,width"),
    ],
)
def test_invalid_numbers_on_the_command_line_raise(options, words, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["tersor", "compress", "resnet20", "--weights", "w", "--data", "digits", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert words in " ".join(capfd.readouterr().err.split())


def test_image_options_are_arguments_of_the_search():
    assert "channels" not in request("digits").arguments
    assert request("digits", channels=1, mean=(0.4,), std=(0.2,)).arguments["mean"] == "(0.4,)"
