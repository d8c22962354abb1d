"""Preparation before training: networks, data, normalization, and errors for settings that do not match."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from recorded_progress import RecordedProgress
from tersor import models, tasks
from tersor.core.errors import InputError
from tersor.core.progress import NO_PROGRESS
from tersor.data.image_sets import Pixels, Splits, View
from tersor.data.splitting import drawn_test_set
from tersor.pipeline import network_checks, setup
from tersor.pipeline.experiment import Experiment
from tersor.pipeline.setup import prepare
from tersor.recipe import DataSource, Network, Recipe, Stage, Teacher
from tersor.training.options import Training


def images(labels, *, channels=3, dtype=torch.uint8):
    drawn = torch.Generator().manual_seed(len(labels))
    pixels = torch.randint(0, 200, (len(labels), 8, 8, channels), generator=drawn).to(dtype)
    return Pixels(pixels, torch.tensor(labels))


def splits(train=(0, 1) * 40, *, classes=2, test=(0, 1) * 4, validation=(0, 1), **changed):
    return Splits(
        images(list(train), **changed), images(list(validation), **changed), images(list(test), **changed),
        tuple("abcdefghijkl"[:classes]), (0.5,) * 3, (0.25,) * 3,
    )  # fmt: skip


def network(classes=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes)).eval()


def of_two():
    return network(2)


OWN = f"{__name__}:of_two"


def recipe(**changed):
    given = {
        "model": Network(name=OWN), "data": DataSource(name="digits"), "stages": (Stage(name="train", steps=1),)
    }  # fmt: skip
    return Recipe(**(given | changed))


def prepared(given=None, data=None, **changed):
    progress = RecordedProgress()
    return prepare(recipe(**changed), model=given, data=data or splits(), progress=progress), progress.lines


def test_a_given_network_counts_as_trained_and_is_copied():
    given = network()
    made, lines = prepared(given, teacher="original")
    assert made.model is not given
    assert made.model_is_trained
    assert made.teacher_is_trained
    assert made.original is made.model
    assert not made.teacher.training
    assert all(torch.equal(a, b) for a, b in zip(given.parameters(), made.teacher.parameters(), strict=True))
    assert lines[0] == "reading images"
    assert lines[1].startswith("normalization: mean 0.5 0.5 0.5, std 0.25 0.25 0.25")
    assert "53.8 % of 80 labeled images" in lines[2], "the teacher is checked on the training images"
    assert made.data.mean == (0.5,) * 3


def test_a_given_teacher_replaces_that_of_the_recipe():
    given, better = network(), network()
    with torch.no_grad():
        next(better.parameters()).add_(1.0)
    for named in ("original", Teacher(name="resnet56", epochs=1)):
        made = prepare(recipe(teacher=named), model=given, teacher=better, data=splits(), progress=RecordedProgress())
        assert made.teacher_is_trained
        assert made.teacher is not better
        assert all(torch.equal(*pair) for pair in zip(better.parameters(), made.teacher.parameters(), strict=True))
    with pytest.raises(InputError, match="but the recipe has no teacher entry to replace"):
        prepare(recipe(), model=given, teacher=better, data=splits(), progress=RecordedProgress())


def test_the_augmentation_is_reported_only_if_a_stage_trains():
    data = DataSource(name="digits", augment="crop_flip")
    progress = RecordedProgress()
    prepare(recipe(data=data), model=network(), data=splits(), progress=progress)
    line = (
        "augmentation of the training images: crop_flip (half of the images are mirrored, and every image is shifted by"
    )
    assert any(each.startswith(line) for each in progress.lines)
    without = (Stage(name="convert", steps=0, epochs=0),)
    assert not any("augmentation" in each for each in prepared(network(), stages=without)[1])


def test_a_network_without_weights_is_untrained_and_its_teacher_is_trained_first(tmp_path):
    made, _ = prepared(teacher=Teacher(name=OWN, epochs=1))
    assert not made.model_is_trained
    assert not made.teacher_is_trained
    assert made.original is made.teacher
    file = tmp_path / "w.safetensors"
    models.save_weights(network(), file, {"normalize_mean": "0.1,0.2,0.3", "normalize_std": "0.4,0.5,0.6"})
    made, _ = prepared(teacher=Teacher(name=OWN, weights=file))
    assert made.teacher_is_trained
    assert not made.model_is_trained
    assert (made.data.mean, made.data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)), "those of the weights file"


def test_the_normalization_is_that_of_the_recipe_or_of_the_weights_files():
    two = [{"a": "1"}, {"a": "2"}]
    source = DataSource(name="digits", mean=(0.9,) * 3, std=(0.8,) * 3)
    given, progress = splits(), RecordedProgress()

    def normalised(recipe, *metadata, own_mean=False):
        return setup._normalised(given, recipe, metadata, progress, own_mean=own_mean)

    with pytest.MonkeyPatch.context() as patch:
        found = {"1": ((0.1,), (0.2,)), "2": ((0.3,), (0.2,)), "": None}
        patch.setattr(models, "normalization", lambda metadata: found[metadata.get("a", "")])
        assert normalised(recipe(data=source), *two) == (given, False)
        assert normalised(recipe(), {}, {}) == (given, True)
        assert normalised(recipe(), {}, {}, own_mean=True) == (given, False)
        changed, computed = normalised(recipe(), {}, two[0])
        assert (changed.mean, changed.std, computed) == ((0.1,), (0.2,), False)
        assert normalised(recipe(), two[1], two[1])[0].mean == (0.3,)
        with pytest.raises(InputError, match="trained with different means"):
            normalised(recipe(), *two)
    sources = [line.partition("(")[2] for line in progress.lines]
    assert sources == [
        "given)",
        "computed from the training images)",
        "from the data)",
        "from the weights file)",
        "from the weights file)",
    ]


def test_a_doubtful_normalization_raises_if_it_was_computed_and_warns_otherwise(monkeypatch):
    checked = []

    def doubt(name, model, batches, task, mean, std):
        checked.append((mean, std))
        return f"{name} is better with other values."

    monkeypatch.setattr(network_checks, "normalization_warning", doubt)
    with pytest.raises(InputError, match=r"is better with other values. The mean and std used here were"):
        prepared(network())
    data = DataSource(name="digits", mean=(0.5,) * 3, std=(0.25,) * 3)
    progress = RecordedProgress()
    made = prepare(recipe(data=data), model=network(), data=splits(), progress=progress)
    assert "warning: own is better with other values." in [line.replace(OWN, "own") for line in progress.lines]
    assert checked == [(made.data.mean, made.data.std)] * 2
    checked.clear()
    prepared()
    assert not checked, "a network without weights"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"teacher": "original"}, "teacher: original means the model before compression, which has no weights"),
        ({"teacher": Teacher(name=OWN)}, "the teacher is untrained"),
        ({"task": "distance"}, "task distance compares the outputs with those of the model before compression"),
        ({"model": Network(name=OWN, weights="missing.pt")}, r"missing\.pt not found"),
        ({"teacher": Teacher(name=OWN, weights="missing.pt")}, r"missing\.pt not found"),
        ({"stages": (Stage(name="a", steps=2, validate_every=1),)}, "stage 'a' has validate_every, and there are no"),
        ({"task": "segmentation"}, "does not fit task segmentation: a segmentation network returns"),
    ],
)
def test_settings_that_do_not_match_raise(changed, message):
    with pytest.raises(InputError, match=message):
        prepared(data=splits(validation=()), **changed)


def test_a_teacher_with_both_weights_and_epochs_raises(tmp_path):
    file = tmp_path / "w.safetensors"
    models.save_weights(network(), file)
    with pytest.raises(InputError, match="both weights and epochs"):
        prepared(teacher=Teacher(name=OWN, weights=file, epochs=1))
    warm = Training(batch_size=80, lr_schedule={"warmup_epochs": 3})
    with pytest.raises(InputError, match="warmup_epochs is 3, which is 3 steps"):
        prepared(teacher=Teacher(name=OWN, epochs=3, training=warm))
    prepared(teacher=Teacher(name=OWN, epochs=4, training=warm))


def test_the_number_of_logits_has_to_match_the_number_of_classes():
    for data, message in (
        (splits(classes=3, train=(0, 1, 2) * 9), r"shape \(2, 2\), but the data has 3 classes, so logits \(2, 3\)"),
        (splits(classes=3, train=(1, 2) * 9, test=(1, 2)), r"range from 1 to 2; class 0 has no image\. .* 3 classes"),
    ):
        with pytest.raises(InputError, match=message):
            prepared(network(), data)
    several = nn.Sequential(network(), nn.Identity())
    several.forward = lambda images: (images, images)
    with pytest.raises(InputError, match="wraps the network and returns its logits alone"):
        network_checks._check_logits(SimpleNamespace(data=splits()), several(torch.zeros(2)), "the model")


def test_the_data_has_to_match_the_task():
    for task, targets, message in (
        ("classification", None, "the images have no targets"),
        ("classification", torch.rand(8), "not class indices"),
    ):
        data = splits()
        data.test.targets = targets
        with pytest.raises(InputError, match=message):
            setup._check_targets(tasks.build(task), data)
    data.test.targets = None
    setup._check_targets(tasks.build("distance"), data)
    with pytest.raises(InputError, match="16 bits per channel"):
        prepared(network(), splits(dtype=torch.uint16), target={"input": "uint8"})


def test_classes_without_training_images_are_listed_in_a_warning():
    progress = RecordedProgress()
    for train, classes in (((0, 1), 2), ((1, 3), 4), ((0,), 7), ((0,), 6)):
        setup._say_what_the_data_lacks(splits(train, classes=classes), progress)
    assert progress.lines == [
        "warning: no training image for 2 of 4 classes: 0, 2",
        "warning: no training image for 6 of 7 classes: 1, 2, 3, 4, 5, ...",
        "warning: no training image for 5 of 6 classes: 1, 2, 3, 4, 5",
    ]


def test_a_test_set_that_was_split_off_is_reported():
    data = splits()
    line = "the data has no test set of its own: 8 images, a fifth of each class, are used as the test set"
    assert line not in prepared(data=data)[1]
    drawn = dataclasses.replace(data, test_is_drawn=True)
    assert line in prepared(data=drawn)[1]
    drawn.test.targets = torch.rand(8, 1)
    assert "8 images, a fifth of the data, are used" in drawn_test_set(drawn)


def test_the_images_for_checks_are_a_random_sample_by_seed():
    experiment = Experiment(recipe(seed=5), tasks.build("classification"), network(), None, splits(), True, False)
    few = network_checks.few_of(experiment, 64)
    assert isinstance(few, View)
    assert len(few) == len(network_checks.few_of(experiment, 64)._index.unique()) == 64
    assert few._index.tolist() == network_checks.few_of(experiment, 64)._index.tolist() != sorted(few._index.tolist())
    assert len(network_checks.few_of(experiment, 1000)) == 80
    other = dataclasses.replace(experiment, recipe=recipe(seed=6))
    assert network_checks.few_of(other, 64)._index.tolist() != few._index.tolist()


def test_random_weights_depend_on_the_seed_only():
    name = Network(name="resnet20", num_classes=3)
    first, same, other = (setup._build(name, None, seed, 3, NO_PROGRESS)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert setup._build(name, splits(), 0, 3, NO_PROGRESS)[0].linear.out_features == 3, (
        "the number in the recipe counts"
    )
    assert setup._build(Network(name="resnet20"), splits(), 0, 3, NO_PROGRESS)[0].linear.out_features == 2


def test_labels_from_1_and_weights_with_other_classes_are_explained_in_the_error(tmp_path):
    file = tmp_path / "w.safetensors"
    models.save_weights(models.build("resnet20", 2), file)
    given = Network(name="resnet20", weights=file)
    with pytest.raises(InputError, match="Number the classes from 0 to 1"):
        setup._build(given, splits(classes=3, train=(1, 2), test=(1, 2)), 0, 3, NO_PROGRESS)
    for data in (splits(classes=3, train=(0, 1, 2), test=(1, 2)), splits(classes=4, train=(1, 2, 3), test=(1, 2))):
        with pytest.raises(models.OtherClasses):
            setup._build(given, data, 0, 3, NO_PROGRESS)


def of_any_number(num_classes=2):
    return network(num_classes)


@pytest.mark.parametrize(
    ("function", "classes", "warned"), [("of_two", 2, True), ("of_two", None, False), ("of_any_number", 2, False)]
)
def test_num_classes_that_a_function_does_not_accept_causes_a_warning(function, classes, warned):
    name = f"{__name__}:{function}"
    given = {"name": name, "num_classes": classes}
    _, lines = prepared(model=Network(**given), teacher=Teacher(**given, epochs=1))
    expected = [
        f"warning: num_classes: 2 of {whose} is not used, because '{name}' has no argument num_classes. Add the "
        "argument, or remove num_classes."
        for whose in ("the model", "the teacher")
    ]
    assert [line for line in lines if "num_classes" in line] == (expected if warned else [])


def test_random_weights_are_reported():
    name = f"{__name__}:of_any_number"
    stages = {0: "quantize", 1: "train"}
    for steps, ends in ((0, "no stage trains it. All results are those of random weights. Write model.weights."),
                        (1, "because model.weights is missing; it is trained from scratch")):  # fmt: skip
        _, lines = prepared(model=Network(name=name), stages=(Stage(name=stages[steps], steps=steps),))
        (line,) = [line for line in lines if "random weights" in line]
        assert line.endswith(ends)
        assert line.startswith(f"{'warning: ' * (not steps)}{name} has random weights")
    assert not any("random weights" in line for line in prepared(network())[1])


def test_a_doubtful_teacher_causes_a_warning(tmp_path):
    file = tmp_path / "w.safetensors"
    broken = network()
    nn.init.zeros_(broken[3].weight)
    models.save_weights(broken, file)
    _, lines = prepared(network(), splits((0, 1) * 200), teacher=Teacher(name=OWN, weights=file))
    assert any(line.startswith("warning: the teacher") for line in lines)
