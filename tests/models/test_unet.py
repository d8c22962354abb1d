import torch
from torch import nn

from tersor.graph.capture import capture
from tersor.models import build


def test_logits_have_the_size_of_the_image():
    model = build("unet", 4).eval()
    assert model(torch.rand(2, 3, 16, 24)).shape == (2, 4, 16, 24)
    assert build("unet").eval()(torch.rand(1, 3, 8, 8)).shape[1] == 11


def test_a_logit_depends_on_its_own_pixel_and_on_distant_pixels():
    model = build("unet", 2).eval()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    model(images)[0, 0, 32, 32].backward()
    reached = images.grad[0].abs().amax(0) > 0
    assert reached[32, 32]
    assert reached.float().mean() > 0.5


def test_the_network_can_be_captured():
    model, images = build("unet", 3).eval(), torch.rand(2, 3, 16, 16)
    captured = capture(model, images)
    torch.testing.assert_close(captured(images), model(images))
    assert sum(isinstance(module, nn.Conv2d) for module in captured.modules()) == 15
