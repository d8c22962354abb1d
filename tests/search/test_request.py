"""The arguments of a search, its experiment, and the training stages of candidates."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS
from tersor.data.image_sets import Pixels, Splits
from tersor.pipeline.experiment import Experiment
from tersor.recipe import DataSource, Network, Recipe, Stage
from tersor.search import request as requests
from tersor.search import training_stage as training_stages
from tersor.search.request import Request, experiment_of
from tersor.search.training_stage import training_stage
from tersor.tasks.classification import Classification


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)),
    )


def images(count, *, gray=False):
    drawn = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 8, 8, 1 if gray else 3), generator=drawn, dtype=torch.uint8)
    return Pixels(pixels.expand(-1, -1, -1, 3).contiguous(), torch.arange(count) % 2)


def splits(count=40, *, gray=False):
    return Splits(images(count, gray=gray), images(10), images(10), ("a", "b"), (0.5,) * 3, (0.25,) * 3)


def request(**changed):
    given = {
        "model": small(), "data": splits(), "weights": None, "runtime": "onnxruntime", "students": (), "pixels": (),
        "augment": None, "limit": None, "seed": 3, "task": "classification",
    }  # fmt: skip
    return Request(**(given | changed))


def test_every_argument_is_compared_when_a_search_is_resumed():
    text = request().arguments
    assert text["data"] == "40 images"
    assert (text["weights"], text["limit"], text["loss"]) == ("None", "None", "None")
    changes = {
        "model": "resnet20", "data": "digits", "weights": Path("w.pt"), "runtime": "openvino", "students": ("a", "b"),
        "pixels": (16, 24), "augment": "flip", "limit": 7, "seed": 4, "task": "segmentation",
        "loss": nn.CrossEntropyLoss(), "metric": small,
    }  # fmt: skip
    assert changes.keys() == text.keys()
    for name, value in changes.items():
        assert {key for key, each in request(**{name: value}).arguments.items() if each != text[key]} == {name}
    assert request(loss=nn.CrossEntropyLoss(), metric=small).arguments["loss"] == "CrossEntropyLoss"
    assert request(loss=nn.CrossEntropyLoss(), metric=small).arguments["metric"] == "small"
    assert request(students=("a", "b"), pixels=(16, 24)).arguments["pixels"] == "16, 24"
    other = small()
    with torch.no_grad():
        other[0].weight[0, 0, 0, 0] += 1e-3
    assert request(model=other).arguments["model"] != text["model"] == request(model=small()).arguments["model"]
    assert text["model"].startswith("Sequential ")


def test_a_changed_weights_file_with_the_same_name_is_detected(tmp_path):
    weights, student = tmp_path / "w.pt", tmp_path / "s.pt"
    given = {"model": "resnet20", "weights": weights, "students": (f"resnet8={student}",)}
    for file in (weights, student):
        file.write_bytes(b"before")
    before = request(**given).arguments
    assert before == request(**given).arguments
    for name, file in (("weights", weights), ("students", student)):
        file.write_bytes(b"later")
        after = request(**given).arguments
        assert {key for key in after if after[key] != before[key]} == {name}
        before = after


def test_a_folder_can_end_with_a_slash(tmp_path):
    assert request(data=f"{tmp_path}/").arguments == request(data=tmp_path).arguments


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, targets: nn.functional.cross_entropy(outputs, targets, reduction="none"), "the loss returned"),
        (lambda outputs, _: outputs.detach().mean(), "the loss has no gradient"),
        (lambda outputs, _: outputs.mean() / missing, "missing"),  # noqa: F821
    ],
)
def test_a_loss_is_tested_before_the_search(monkeypatch, loss, message):
    monkeypatch.setattr(requests, "prepare", prepared)
    with pytest.raises(InputError, match=message):
        experiment_of(request(loss=loss), NO_PROGRESS)
    experiment_of(request(loss=nn.functional.cross_entropy), NO_PROGRESS)


def prepared(recipe, *, model, data, progress, own_mean):
    return Experiment(recipe, recipe.task.build(), model, model, data, True, True)


def test_students_get_their_weights_files(tmp_path):
    file = tmp_path / "w=1.safetensors"
    file.write_text("")
    found = request(students=("resnet20", f"wide={file}")).weights_of_students()
    assert found == {"resnet20": None, "wide": file}
    with pytest.raises(InputError, match="missing of the student wide not found"):
        request(students=("wide=missing",)).weights_of_students()


def test_the_experiment_is_built_from_the_request(monkeypatch):
    def prepare(recipe, *, model, data, progress, own_mean):
        assert not own_mean or recipe.data.name == "your.module:splits"
        return Experiment(recipe, recipe.task.build(), model, model, data, True, True)

    monkeypatch.setattr(requests, "prepare", prepare)
    given = request(limit=30)
    made = experiment_of(given, NO_PROGRESS)
    recipe = made.recipe
    assert (recipe.seed, recipe.target.runtime, recipe.teacher) == (3, "onnxruntime", "original")
    assert (recipe.data.augment, recipe.data.limit) == ("crop_flip", 30)
    assert made.model is given.model
    assert made.data is given.data
    assert isinstance(made.task, Classification)
    assert experiment_of(request(augment="flip"), NO_PROGRESS).recipe.data.augment == "flip"
    own = experiment_of(request(metric=lambda *_: 0.5), NO_PROGRESS)
    assert not isinstance(own.task, Classification)
    with pytest.raises(InputError, match="higher is better"):
        experiment_of(request(task="regression"), NO_PROGRESS)
    with pytest.raises(
        InputError, match=r"pixels is 7\. Write the height and width of the images in pixels, 8 or more"
    ):
        experiment_of(request(pixels=(8, 7)), NO_PROGRESS)
    with pytest.raises(InputError, match="pixels cannot be used with images that are already loaded"):
        experiment_of(request(pixels=(8,)), NO_PROGRESS)
    with pytest.raises(InputError, match="weights is for a network that is given by name, but the model is of type"):
        experiment_of(request(weights=Path("w.pt")), NO_PROGRESS)
    named = experiment_of(request(model="resnet20", weights=Path("w.pt")), NO_PROGRESS)
    assert named.recipe.model == Network(name="resnet20", weights=Path("w.pt"))
    assert named.model is None, "`prepare` builds it"


def test_images_are_mirrored_or_cropped_only_if_that_keeps_their_meaning():
    assert requests._augmentation(request(), images(10)) == "crop_flip"
    assert requests._augmentation(request(task="detection"), images(10)) == "flip"
    assert requests._augmentation(request(), images(10, gray=True)) == "none"
    mixed = images(65, gray=True)
    mixed._pixels[64, 0, 0, 0] ^= 1
    assert requests._augmentation(request(), mixed) == "none", "the first 64 images are looked at"
    mixed._pixels[63, 0, 0, 0] ^= 1
    assert requests._augmentation(request(), mixed) == "crop_flip"


def test_the_source_of_the_data_can_be_a_folder_a_csv_file_or_a_name(tmp_path):
    assert requests._source(request(data=str(tmp_path), limit=5)) == DataSource(folder=tmp_path, limit=5)
    assert requests._source(request(data=Path("x.csv"))) == DataSource(csv=Path("x.csv"))
    assert requests._source(request(data="digits")) == DataSource(name="digits")
    assert requests._source(request(limit=5)).limit == 5
    network = requests._network(request(model="resnet20", weights=Path("w.pt")))
    assert network == Network(name="resnet20", weights=Path("w.pt"))
    assert requests._network(request()).name == "torch.nn.modules.container:Sequential"


@pytest.mark.parametrize(("train", "validation", "shares"), [(1991, 9, [0.1]), (1990, 9, [0.1, 0.25]), (9, 0, [0.1])])
def test_for_few_images_a_larger_fraction_is_held_out(monkeypatch, train, validation, shares):
    requested = []

    def load(**options):
        requested.append(options)
        return dataclasses.replace(splits(), train=range(train), validation=range(validation))

    monkeypatch.setattr(requests, "load", load)
    found, source = requests._loaded(request(data="digits"), DataSource(name="digits", limit=train))
    assert [each["validation"] for each in requested] == shares
    assert all((each["seed"], each["name"], each["limit"]) == (3, "digits", train) for each in requested)
    assert source.validation == shares[-1]
    assert len(found.train) == train


def test_the_held_out_fraction_can_be_given_by_the_user(monkeypatch):
    loaded = []

    def load(**options):
        loaded.append(options["validation"])
        return dataclasses.replace(splits(), train=range(30), validation=range(10))

    monkeypatch.setattr(requests, "load", load)
    requests._loaded(request(data="digits", validation=0.4), DataSource(name="digits"))
    assert loaded == [0.4], "no larger share of few images"
    for share in (0, 1, -0.5):
        with pytest.raises(InputError, match=f"validation is {share}. Write a fraction above 0 and below 1"):
            request(data="digits", validation=share)
    with pytest.raises(InputError, match="validation cannot be used with images that are already loaded"):
        request(validation=0.4)
    assert request(data="digits", validation=0.4).arguments["validation"] == "0.4"


def staged(model, teacher, *, train=40, name="train-1", steps=160, fresh=False, settled=False):
    recipe = Recipe(
        model=Network(name="resnet20"), teacher="original", data=DataSource(name="digits"),
        stages=(Stage(name="train", steps=1),),
    )  # fmt: skip
    data = splits(train)
    experiment = Experiment(recipe, Classification(), model, teacher, data, True, True)
    return training_stage(experiment, name, steps, model, fresh=fresh, settled=settled)


def methods_of(stage):
    return {type(each).__name__: each for each in stage.methods}


def test_a_changed_original_is_distilled_from_the_original_at_every_resolution():
    stage = staged(small(), small())
    assert (stage.name, stage.steps, stage.batch_size) == ("train-1", 160, 5), "eight batches in an epoch of 40 images"
    assert (stage.optimizer.name, stage.optimizer.learning_rate) == ("sgd", 0.02)
    assert stage.lr_schedule.warmup_epochs == 0
    made = methods_of(stage)
    assert made.keys() == {"SoftTargets", "FitNet"}
    soft, features = made["SoftTargets"], made["FitNet"]
    assert (soft.temperature, soft.loss_weight, soft.label_weight) == (4.0, 0.9, 0.1)
    assert (features.loss_weight, features.regressor) == (3.0, False)
    assert list(features.layers) == list(features.teacher_layers) == ["2", "5"]


def test_the_batch_size_depends_on_the_number_of_images():
    assert staged(small(), small(), train=10).batch_size == 2
    assert staged(small(), small(), train=8 * 127).batch_size == 127
    assert staged(small(), small(), train=8 * 130).batch_size == 128


def test_a_network_with_random_weights_has_a_warm_up_and_uses_the_last_feature_map():
    stage = staged(small(), small(), fresh=True)
    assert stage.optimizer.learning_rate == 0.1
    assert stage.lr_schedule.warmup_epochs == 2.0, "a tenth of 160 steps, eight in an epoch"
    features = methods_of(stage)["FitNet"]
    assert (features.layers, features.regressor) == ((), False), "the default: the last layer"


def test_different_channel_counts_require_a_regressor():
    wide = nn.Sequential(*(each for each in small()))
    wide[3], wide[4], wide[8] = nn.Conv2d(4, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 2)
    features = methods_of(staged(wide, small()))["FitNet"]
    assert features.regressor
    assert list(features.layers) == ["2", "5"]


def test_without_batchnorm_adamw_is_used_and_without_feature_maps_there_is_no_feature_loss():
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    stage = staged(plain, plain, settled=True)
    assert (stage.optimizer.name, stage.optimizer.weight_decay) == ("adamw", 0.05)
    assert stage.optimizer.learning_rate == pytest.approx(0.02 * 0.02 * 0.4), "after longer training runs"
    assert methods_of(stage).keys() == {"SoftTargets"}


def test_quantization_aware_training_uses_lsq(monkeypatch):
    monkeypatch.setattr(training_stages, "attach", lambda *_: None)
    stage = staged(small(), small(), name="quantize")
    assert stage.optimizer.learning_rate == 0.002
    assert methods_of(stage).keys() == {"LSQ", "SoftTargets"}
    assert stage.lr_schedule.warmup_epochs == 0
