"""Which images are used for training, choosing and testing."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from recorded_progress import RecordedProgress
from tersor import models
from tersor.checkpoint.store import Checkpoints
from tersor.core.progress import NO_PROGRESS
from tersor.data.image_sets import Pixels, Splits, View
from tersor.data.splitting import joined
from tersor.pipeline.experiment import Experiment
from tersor.recipe import DataSource, Network, Recipe, Stage, Teacher
from tersor.search import workbench
from tersor.search.candidate import Candidate, Removal
from tersor.search.workbench import Workbench
from tersor.tasks.classification import Classification
from tersor.training.loop import fit


def images(first, count):
    pixels = torch.arange(first, first + count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).contiguous()
    return Pixels(pixels, torch.arange(count, dtype=torch.int64) % 2)


def values(selected):
    return selected.take(torch.arange(len(selected)))[:, 0, 0, 0].tolist()


def bench(data, tmp_path, **source):
    recipe = Recipe(
        model=Network(name="resnet20"), data=DataSource(name="digits", **source), stages=(Stage(name="train", steps=1),)
    )
    network = nn.Linear(1, 2)
    experiment = Experiment(recipe, Classification(), network, network, data, True, True)
    return Workbench(experiment, {}, tmp_path, NO_PROGRESS)


def splits():
    return Splits(images(0, 40), images(40, 10), images(50, 20), ("a", "b"), (0.5,) * 3, (0.25,) * 3)


def test_with_test_images_for_the_choice_half_of_them_choose_and_held_out_images_are_trained_on(tmp_path):
    changed = bench(splits(), tmp_path).choosing_on_test_images().experiment
    assert values(changed.data.train) == list(range(50))
    assert changed.data.train.targets.tolist() == [*([0, 1] * 20), *([0, 1] * 5)]
    chosen, rest = values(changed.data.validation), values(changed.data.test)
    assert len(chosen) == len(rest) == 10
    assert sorted([*chosen, *rest]) == list(range(50, 70))
    assert (changed.recipe.data.validation, changed.recipe.data.mean) == (0.0, (0.5,) * 3), "for `tersor run`"


def test_limited_training_images_are_not_changed(tmp_path):
    changed = bench(splits(), tmp_path, limit=40).choosing_on_test_images().experiment
    assert values(changed.data.train) == list(range(40))
    assert changed.recipe.data.validation == 0.1


def test_images_that_are_not_in_memory_are_not_joined():
    whole = images(0, 10)
    assert joined(whole, View(whole, torch.tensor([7]))) is None


class Small(nn.Module):
    """A network that trains in milliseconds."""

    def __init__(self, num_classes=2):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes)),
        )

    def forward(self, images):
        return self.layers(images)


def made(num_classes):
    return Small(num_classes)


OWN = f"{__name__}:made"


def with_network(tmp_path, students=None, **source):
    given = bench(splits(), tmp_path, **source)
    network = Small().eval()
    experiment = replace(given.experiment, model=network, teacher=network)
    return Workbench(experiment, students or {}, tmp_path, NO_PROGRESS, checkpoint_every=7)


def test_the_recipe_of_a_candidate_contains_its_changes(tmp_path):
    weights = tmp_path / "w.safetensors"
    of = with_network(tmp_path, {"resnet20": None, "resnet56": weights})
    stages = (Stage(name="a"),)
    plain = of.recipe(Candidate(), stages)
    assert plain == of.experiment.recipe.model_copy(update={"stages": stages})
    student = of.recipe(Candidate("resnet56", pixels=24), stages)
    assert student.model == Network(name="resnet56", weights=weights)
    assert student.teacher == Teacher(name="resnet20")
    assert student.data.image_size == 24
    assert student.stages == stages


def test_a_student_has_seeded_random_weights_or_those_of_its_file(tmp_path):
    weights = tmp_path / "w.safetensors"
    models.save_weights(Small(), weights)
    of = with_network(tmp_path, {OWN: weights, "resnet20": None})
    trained = of.experiment_of(Candidate(OWN), ())
    assert trained.model_is_trained
    assert torch.equal(trained.model.layers[0].weight, Small().layers[0].weight)
    fresh = of.experiment_of(Candidate("resnet20"), ())
    assert not fresh.model_is_trained
    assert fresh.model.linear.out_features == 2
    assert torch.equal(fresh.model.conv1.weight, of.student("resnet20").conv1.weight)
    assert of.experiment_of(Candidate(), ()).model is of.experiment.model


def test_images_of_another_size_are_loaded_only_once(tmp_path, monkeypatch):
    of, loaded = with_network(tmp_path, validation=0.2), []

    def load(**options):
        loaded.append(options)
        return splits()

    monkeypatch.setattr("tersor.search.workbench.load", load)
    first = of.experiment_of(Candidate(pixels=24), ())
    assert of.experiment_of(Candidate(pixels=24), ()).data is first.data
    (options,) = loaded
    assert (options["image_size"], options["validation"], options["name"]) == (24, 0.2, "digits")
    assert (options["mean"], options["std"]) == ((0.5,) * 3, (0.25,) * 3), "those of the original"
    assert len(first.data.validation) == 10
    assert of.experiment_of(Candidate(), ()).data is of.experiment.data
    halved = replace(of, tests_choose=True)
    assert len(halved.experiment_of(Candidate(pixels=24), ()).data.test) == 10
    assert halved.validation_of(halved.experiment) is halved.validation
    assert of.validation_of(first) is not of.validation
    assert of.example(Candidate(pixels=24)).shape == (1, 3, 8, 8)


def test_without_validation_images_the_training_images_are_used(tmp_path):
    of = with_network(tmp_path)
    assert len(of.validation.images) == 10
    none = replace(splits(), validation=View(images(0, 1), torch.arange(0)))
    alone = replace(of, experiment=replace(of.experiment, data=none))
    assert len(alone.validation.images) == 40


def test_a_training_resumes_from_its_earlier_stages(tmp_path):
    of = with_network(tmp_path)
    candidate = Candidate()
    one = of.stage(candidate, "train-1", 2, of.experiment.model)
    assert (one.name, one.steps, one.batch_size) == ("train-1", 2, 5)
    network, record = of.train(candidate, (one,), 60.0)
    assert (record.name, record.steps) == ("train-1", 2)
    assert not torch.equal(network.layers[0].weight, of.experiment.model.layers[0].weight)
    two = of.stage(candidate, "train-2", 3, network, settled=True)
    assert two.optimizer.learning_rate == pytest.approx(0.4 * one.optimizer.learning_rate)
    _, record = of.train(candidate, (one, two), 60.0)
    assert (record.name, record.steps) == ("train-2", 3)
    ends = sorted(each.name[:10] for each in (tmp_path / candidate.name).glob("0*-end-*"))
    assert ends == ["01-train-1", "02-train-2"]
    _, record = of.train(candidate, (one, two.model_copy(update={"name": "other"})), 60.0)
    assert record.name == "other"
    assert [each.name[:8] for each in sorted((tmp_path / candidate.name).glob("02-*"))] == ["02-other"]
    assert of.pace(of.experiment.model, 2) > 0


def test_measuring_the_pace_does_not_average_batchnorm_statistics(tmp_path, monkeypatch):
    of, progress, models_used = with_network(tmp_path), RecordedProgress(), []

    def recorded(attachment, *arguments, **options):
        models_used.append(attachment.model)
        return fit(attachment, *arguments, progress=progress, **options)

    monkeypatch.setattr(workbench, "fit", recorded)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(192, 2))
    of.pace(network, 2)
    assert [each[0].num_batches_tracked for each in models_used] == [1, 2]
    assert not any("BatchNorm" in line for line in progress.lines)
    assert network[0].momentum == 0.1


def test_build_returns_a_copy_of_the_network(tmp_path):
    of = with_network(tmp_path)
    built = of.build(Candidate())
    assert built is not of.experiment.model
    assert torch.equal(built.layers[0].weight, of.experiment.model.layers[0].weight)
    pruned = of.build(Candidate(keep_macs=0.5))
    assert sum(each.numel() for each in pruned.parameters()) < sum(each.numel() for each in built.parameters())


class Residual(nn.Module):
    """Three residual branches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.branches = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, images):
        features = self.stem(images)
        for branch in self.branches:
            features = features + branch(features.relu())
        return self.head(features.mean((2, 3)))


def test_a_candidate_starts_from_the_checkpoints_before_its_last_removal(tmp_path):
    given = bench(splits(), tmp_path)
    of = Workbench(replace(given.experiment, model=Residual(), teacher=Residual()), {}, tmp_path, NO_PROGRESS)
    parent, child = Candidate(branches=1), Candidate(branches=1, later=(Removal(branches=1),))
    train = [Stage(name=f"train-{number}", steps=1, batch_size=4) for number in (1, 2)]
    trained, _ = of.train(parent, train[:1], 60.0)
    assert len(of.branches(parent, train[:1])) == 2
    shares = of.branches(Candidate(pixels=4))
    assert len(shares) == 3
    assert 0 < sum(shares) < 1
    of.start_from(child, parent)
    kept = [sorted(path.name for path in (tmp_path / each.name).glob("0*")) for each in (parent, child)]
    assert kept[0] == kept[1] != [], "so no training is repeated"
    before = (*train[:1], *child.last_removal)
    assert len(of.branches(child, before)) == 1
    checkpoints = Checkpoints(tmp_path / child.name)
    assert checkpoints.end_of(3).stages[-1]["validation_score"] is None, "only trained stages are validated"
    assert checkpoints.end_of(2).stages[-1]["validation_score"] is not None
    made, record = of.train(child, (*before, train[1]), 60.0)
    assert (record.name, record.steps) == ("train-2", 1)
    assert sum(isinstance(module, nn.Conv2d) for module in made.modules()) == 2
    again, _ = of.train(parent, train[:1], 60.0)
    assert all(torch.equal(*pair) for pair in zip(trained.parameters(), again.parameters(), strict=True))
    of.start_from(child, Candidate())
    assert len(of.branches(child, (*before, train[1]))) == 1, "a folder that is there stays"
    assert [stage.name for stage in child.stages((*before, train[1]))] == [
        *("prune", "train-1", "prune-2", "train-2", "quantize")
    ]
