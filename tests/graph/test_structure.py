import json

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils import parametrize

from tersor.core.errors import InputError
from tersor.core.method import chain
from tersor.core.target import Target
from tersor.graph.structure import rebuild, structure
from tersor.methods.channel_pruning import ChannelPruning
from tersor.methods.ptq import PTQ
from tersor.methods.qat import QAT
from tersor.methods.weight_pruning import WeightPruning
from tersor.zoo import build

IMAGES = torch.rand(4, 3, 16, 16)
LAID = {
    "nothing": [],
    "masks": [WeightPruning()],
    "grids": [PTQ(exclude=("linear",))],
    "all": [ChannelPruning(keep_macs=0.6), WeightPruning(sparsity=0.7), PTQ(bits=4)],
}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("laid", LAID)
def test_a_fresh_network_takes_the_state(laid, runtime):
    attached = chain(LAID[laid], build("resnet20", 10).eval(), data=[IMAGES], target=Target(runtime=runtime))
    for _ in attached.begin():
        pass
    found = structure(attached.model)
    again = rebuild(build("resnet20", 10).eval(), json.loads(json.dumps(found)))
    missing, unexpected = again.load_state_dict(attached.model.state_dict(), strict=False)
    assert (missing, unexpected) == ([], [])
    assert torch.equal(again(IMAGES), attached.model(IMAGES))
    assert structure(again) == found


class Own(nn.BatchNorm2d):
    def forward(self, values):
        return 2 * super().forward(values)


def with_other_norms():
    """One that is split, one with a forward of its own, one of several processes."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 4, 3),
        BatchNormAct2d(4),
        nn.Conv2d(4, 4, 3),
        Own(4),
        nn.Conv2d(4, 4, 3),
        nn.SyncBatchNorm(4),
    ]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def test_norms_of_other_classes_are_frozen_and_rebuilt():
    attached = QAT(freeze_norm_at=0.5).attach(with_other_norms(), data=[IMAGES], steps=2)
    list(attached.begin())
    attached.model.train()
    attached.after_step(0, torch.optim.SGD(attached.model.parameters()))
    attached.finish()
    found = structure(attached.model)
    assert found["freezable"] == ["1", "3", "5"]
    again = rebuild(with_other_norms(), json.loads(json.dumps(found)))
    again.load_state_dict(attached.model.state_dict())
    assert not any(again.train().get_submodule(name).training for name in found["freezable"])
    assert torch.equal(again.eval()(IMAGES), attached.model.eval()(IMAGES))


def test_rounds_of_cuts_are_replayed_one_after_the_other():
    model = build("resnet20", 10).eval()
    for method in (ChannelPruning(keep_macs=0.8), ChannelPruning(keep_macs=0.7, scope="global", round_to=2)):
        attached = method.attach(model, data=[IMAGES])
        list(attached.begin())
        model = attached.model
    found = structure(model)
    assert len(found["cuts"]) == 2
    again = rebuild(build("resnet20", 10).eval(), json.loads(json.dumps(found)))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IMAGES), model.eval()(IMAGES))


def test_a_strange_parametrization_is_told():
    model = build("resnet20", 10)
    parametrize.register_parametrization(model.conv1, "weight", nn.Identity())
    with pytest.raises(InputError, match="Identity"):
        structure(model)
