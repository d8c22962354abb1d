"""Networks and images in the stages of a recipe."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from recorded_progress import RecordedProgress
from tersor.checkpoint.store import Checkpoints
from tersor.core import device
from tersor.core.errors import NonFiniteLoss
from tersor.core.plain_values import plain_dataclass
from tersor.core.progress import NullProgress
from tersor.data import load
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import attach, run_stages, train_teacher
from tersor.recipe import parse
from tersor.training.attachment import Attachment
from tersor.training.method import Method
from tersor.training.objective import LossTerm

RECIPE = """\
model: {name: "toy_networks:resnet8"}
teacher: {name: "toy_networks:resnet8", epochs: 1, training: {batch_size: 32}}
data: {name: digits, limit: 64, augment: flip}
seed: SEED
stages:
  - {name: distil, steps: 3, batch_size: 32, methods: [soft_targets]}
  - {name: quantize, methods: [{ptq: {calibration_images: 32}}]}
"""


def run_recipe(folder, seed: int, noise: int) -> dict[str, torch.Tensor]:
    """The final state of the recipe in a process that has drawn `noise` random numbers before."""
    torch.rand(noise)
    recipe = parse(RECIPE.replace("SEED", str(seed)), "recipe.yaml")
    experiment = prepare(recipe, model=None, data=None, progress=NullProgress())
    checkpoints = Checkpoints(folder)
    experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, NullProgress()))
    return run_stages(experiment, checkpoints, NullProgress())[0].state_dict()


def test_the_same_seed_is_bit_identical_and_another_seed_is_not(tmp_path):
    first = run_recipe(tmp_path / "a", seed=3, noise=1)
    second = run_recipe(tmp_path / "b", seed=3, noise=7)
    other = run_recipe(tmp_path / "c", seed=4, noise=1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(
        first["linear.parametrizations.weight.original"], other["linear.parametrizations.weight.original"]
    )


def test_preparing_a_run_does_not_change_the_random_state_of_the_caller(tmp_path):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    recipe = parse(RECIPE.replace("SEED", "5"), "recipe.yaml")
    prepare(recipe, model=None, data=None, progress=NullProgress())
    assert torch.equal(torch.rand(3), expected)


class Interpolates(nn.Module):
    """Fails under bfloat16 autocast."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def forward(self, images):
        features = self.conv(images)
        return self.linear(torch.lerp(features, images[:, :1, 1:-1, 1:-1].expand_as(features), 0.5).mean((2, 3)))


def test_networks_that_fail_in_bfloat16_are_trained_in_float32(tmp_path, monkeypatch):
    monkeypatch.setattr(device, "cpu_flags", lambda: {"amx_bf16"})
    text = RECIPE.replace("SEED", "1").replace("toy_networks:resnet8", f"{__name__}:Interpolates")
    progress = RecordedProgress()
    experiment = prepare(parse(text, "recipe.yaml"), model=None, data=None, progress=progress)
    checkpoints = Checkpoints(tmp_path)
    experiment = replace(experiment, teacher=train_teacher(experiment, checkpoints, progress))
    record = run_stages(experiment, checkpoints, progress)[1][0]
    assert record.precision == "float32"
    notes = [line for line in progress.lines if line.endswith("training in float32")]
    assert [line.partition(" (")[0] for line in notes] == [
        "the teacher does not run under bfloat16 autocast",
        "distil: the network does not run under bfloat16 autocast",
    ]


@pytest.mark.parametrize(("seconds", "advised"), [(None, True), (60.0, False)])
def test_the_error_of_a_diverged_training_in_a_search_has_no_keys_of_a_recipe(seconds, advised, tmp_path):
    text = RECIPE.replace("SEED", "1").replace("steps: 3,", "steps: 3, optimizer: {learning_rate: 1.0e+30},")
    experiment = prepare(parse(text, "recipe.yaml"), model=None, data=None, progress=NullProgress())
    experiment = replace(experiment, teacher=copy.deepcopy(experiment.model))
    with pytest.raises(NonFiniteLoss) as caught:
        run_stages(experiment, Checkpoints(tmp_path), NullProgress(), seconds)
    assert ("Try a smaller optimizer.learning_rate" in str(caught.value)) is advised
    assert ("Last good checkpoint" in str(caught.value)) is advised


PRUNED = """\
model: {name: "toy_networks:resnet8", num_classes: 10}
data: {name: digits, limit: 200}
stages:
  - name: prune
    steps: 1
    batch_size: 32
    methods:
      - channel_pruning: {keep_macs: 0.5, importance: obs, scope: global, branches: 1, round_to: 2}
"""


class Bars(NullProgress):
    """Records every progress bar: task, total, progress."""

    def __init__(self):
        self.drawn = []

    def start(self, task, total):
        self.drawn.append([task, total, 0])

    def advance(self, items=1, **values):
        assert items >= 0
        self.drawn[-1][2] += items


class Counted:
    """Images that count how many of them were read."""

    def __init__(self, images):
        self.images, self.targets, self.looked_at = images, images.targets, set()
        self.size, self.channels, self.largest = images.size, images.channels, images.largest

    def __len__(self):
        return len(self.images)

    def targets_at(self, index):
        return self.targets[index]

    def take(self, index):
        self.looked_at |= set(index.tolist())
        return self.images.take(index)


def test_attach_reports_progress_and_its_rehearsal_reads_few_images(tmp_path):
    data = load(name="digits", limit=200)
    counted, bars = Counted(data.train), Bars()
    experiment = prepare(parse(PRUNED, "recipe.yaml"), model=None, data=replace(data, train=counted), progress=bars)
    rehearsed, bars.drawn = bars.drawn, []
    calibration, losses = 64, 2
    assert len(counted.looked_at) <= calibration + losses < len(counted)
    run_stages(experiment, Checkpoints(tmp_path), bars)
    assert len(counted.looked_at) >= 3 * 64
    of_attaching = (
        "effect of removing each residual branch",
        "Hessian statistics",
        "loss increase of each channel group",
    )
    for drawn, images in ((rehearsed, 64), (bars.drawn, 3 * 64)):
        branches, seen, groups = drawn[: len(of_attaching)]
        for (task, *_), what in zip((branches, seen, groups), of_attaching, strict=True):
            assert task.startswith(f"prune: {what}")
        assert branches[1:] == [3 * images // 64] * 2
        assert seen[2] == images <= seen[1]
        assert groups[1] == groups[2] > 1


TWO_STAGES = """\
model: {name: "toy_networks:resnet8", num_classes: 10}
data: {name: digits, limit: 64}
stages:
  - {name: scratch, steps: 1, batch_size: 32}
  - {name: further, steps: 1, batch_size: 32, optimizer: {name: adamw}}
  - {name: explicit, steps: 1, batch_size: 32, optimizer: {learning_rate: 0.02}}
"""


def test_the_default_learning_rate_depends_on_trained_weights(tmp_path):
    experiment = prepare(parse(TWO_STAGES, "recipe.yaml"), model=None, data=None, progress=NullProgress())
    _, records = run_stages(experiment, Checkpoints(tmp_path), NullProgress())
    assert [list(record.notes) for record in records] == [
        ["learning rate 0.1, the default for random weights"],
        ["learning rate 0.0001, the default for trained weights"],
        [],
    ]


class Projection(LossTerm):
    """Creates a layer."""

    name = "projection"

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(10, 10)

    def forward(self, batch, student, teacher):
        return self.layer(student.outputs).square().mean()


@plain_dataclass(frozen=True)
class Projects(Method):
    def attach(self, model, context):
        return Attachment(model, [Projection()])


def test_layers_created_by_a_term_are_initialized_from_the_seed_of_the_recipe(tmp_path):
    text = RECIPE.replace("SEED", "1").replace("soft_targets", f'"{__name__}:Projects"')
    experiment = prepare(parse(text, "recipe.yaml"), model=None, data=None, progress=NullProgress())
    weights = []
    for noise in (1, 7):
        torch.rand(noise)
        attached = attach(experiment, experiment.recipe.stages[0], experiment.model, NullProgress())
        weights.append(attached.terms[0].layer.weight.detach().clone())
    assert torch.equal(*weights)
