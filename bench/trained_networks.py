"""Eight small networks of other families than ResNet, trained briefly on CIFAR-10; their weights are cached.

Strides, patches and widths suit images of 32 x 32 pixels, and training suits two cores: AdamW, one cycle, flipped and
cropped images. Only the training images are used; `bench/ptq_defaults.py` chooses on the validation images. Training
goes on after its last complete epoch. The weights are in the cache folder of `images.py`, and are not committed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from images import MEAN, STD, TRAINED, Subject, cifar, folder
from tersor.data import Batches, Images
from tersor.data.batch import Batch

CLASSES = 10
BATCH = 100


def mobilenet_v2() -> nn.Module:
    """MobileNetV2 of half width: ReLU6, depthwise convolutions, linear bottlenecks."""
    from torchvision.models import MobileNetV2

    blocks = [[1, 16, 1, 1], [6, 24, 1, 1], [6, 32, 2, 2], [6, 64, 3, 2], [6, 96, 2, 1], [6, 160, 1, 1]]
    return MobileNetV2(CLASSES, 0.5, blocks)


def mobilenet_v3() -> nn.Module:
    """MobileNetV3 with the blocks of its small variant: hard swish, squeeze-and-excitation."""
    from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3

    block = partial(InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, use_se=True, activation="RE", stride=1),
        block(16, 3, 72, 24, use_se=False, activation="RE", stride=2),
        block(24, 3, 88, 24, use_se=False, activation="RE", stride=1),
        block(24, 5, 96, 40, use_se=True, activation="HS", stride=2),
        block(40, 5, 240, 40, use_se=True, activation="HS", stride=1),
        block(40, 5, 120, 48, use_se=True, activation="HS", stride=1),
        block(48, 5, 288, 96, use_se=True, activation="HS", stride=1),
    ]
    return MobileNetV3(blocks, 256, CLASSES)


def efficientnet_lite() -> nn.Module:
    """EfficientNet-Lite of 0.4 of the width: ReLU6, no squeeze-and-excitation."""
    from timm.models._efficientnet_builder import decode_arch_def, round_channels
    from timm.models.efficientnet import EfficientNet

    blocks = [
        ["ds_r1_k3_s1_e1_c16"],
        ["ir_r2_k3_s1_e6_c24"],
        ["ir_r2_k5_s2_e6_c40"],
        ["ir_r3_k3_s2_e6_c80"],
        ["ir_r3_k5_s1_e6_c112"],
        ["ir_r1_k3_s1_e6_c320"],
    ]
    return EfficientNet(
        decode_arch_def(blocks),
        CLASSES,
        num_features=512,
        stem_size=16,
        fix_stem=True,
        round_chs_fn=partial(round_channels, multiplier=0.4),
        act_layer=nn.ReLU6,
    )


def shufflenet_v2() -> nn.Module:
    """ShuffleNetV2 of width 1.0 without its first two strides: split, concatenated and shuffled channels."""
    from torchvision.models import ShuffleNetV2

    network = ShuffleNetV2([2, 4, 2], [24, 96, 192, 384, 512], CLASSES)
    network.set_submodule("maxpool", nn.Identity())
    return network


def repvgg() -> nn.Module:
    """RepVGG in its inference form: one convolution with bias per layer, whose channels differ much in range."""
    return reparametrised(repvgg_in_training())


def reparametrised(network: nn.Module) -> nn.Module:
    """Return a copy with the branches of each layer added up."""
    from timm.utils.model import reparameterize_model

    return reparameterize_model(network)


def repvgg_in_training() -> nn.Module:
    """RepVGG with its three branches."""
    from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg

    shapes = ((2, 24, 1), (4, 48, 2), (6, 96, 2), (1, 192, 2))
    blocks = tuple(ByoBlockCfg("rep", d=depth, c=width, s=stride, gs=0) for depth, width, stride in shapes)
    return ByobNet(ByoModelCfg(blocks, stem_type="rep", stem_chs=24), num_classes=CLASSES)


def convnext() -> nn.Module:
    """ConvNeXt with the depths of pico and half of its width: LayerNorm, GELU, 7 x 7 depthwise convolutions."""
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(num_classes=CLASSES, depths=(2, 2, 6, 2), dims=(32, 64, 128, 256), patch_size=2)


def vit() -> nn.Module:
    """ViT of 0.8 million parameters on patches of 4 x 4 pixels. It is trained on half of the patches."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        32, 4, num_classes=CLASSES, global_pool="avg", embed_dim=128, depth=4, num_heads=4, patch_drop_rate=0.5
    )


def swin() -> nn.Module:
    """Swin of three stages on patches of 2 x 2 pixels, windows of 4 x 4."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        32, 2, num_classes=CLASSES, window_size=4, embed_dim=40, depths=(2, 2, 2), num_heads=(2, 4, 8)
    )


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        build: returns the network in the form that is trained.
        epochs: over 45,000 images.
        learning_rate: the highest of the cycle.
        bfloat16: whether to train under autocast, where that is faster on a processor with such units.
        finished: returns the network in the form that is compressed; the same if None.
    """

    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    bfloat16: bool = False
    finished: Callable[[nn.Module], nn.Module] | None = None


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Training]] = {
    "repvgg": (repvgg, Training(repvgg_in_training, 4, 3e-3, True, reparametrised)),
    "convnext": (convnext, Training(convnext, 6, 3e-3, bfloat16=True)),
    "shufflenet_v2": (shufflenet_v2, Training(shufflenet_v2, 5, 4e-3)),
    "mobilenet_v2_half": (mobilenet_v2, Training(mobilenet_v2, 5, 4e-3)),
    "mobilenet_v3": (mobilenet_v3, Training(mobilenet_v3, 5, 4e-3)),
    "swin": (swin, Training(swin, 6, 2e-3, bfloat16=True)),
    "efficientnet_lite": (efficientnet_lite, Training(efficientnet_lite, 5, 4e-3)),
    "vit": (vit, Training(vit, 6, 2e-3)),
}
"""By name, in the order of training: the network as it is compressed, and how it is trained."""


def weights(name: str) -> Path:
    """Return the path of the trained weights."""
    return folder().parent / "trained_networks" / f"{name}.safetensors"


def trained(name: str) -> nn.Module:
    """Return a new copy in eval mode.

    Raises:
        FileNotFoundError: it was not trained yet.
    """
    network = NETWORKS[name][0]()
    network.load_state_dict(load_file(weights(name)))
    return network.eval()


def train(name: str) -> None:
    """Train from the last complete epoch on and write the weights."""
    training = NETWORKS[name][1]
    torch.manual_seed(0)
    network = training.build().to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    part = weights(name).with_suffix(".part")
    data = Batches(cifar().train, BATCH, mean=MEAN, std=STD, shuffle=True, seed=0, augment="crop_flip")
    optimizer = torch.optim.AdamW(network.parameters(), lr=training.learning_rate, weight_decay=0.05)
    steps = training.epochs * (len(cifar().train) // BATCH)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.learning_rate, steps, pct_start=0.2)
    done = _resume(part, network, optimizer, cycle)
    for epoch in range(done, training.epochs):
        start = time.perf_counter()
        data.set_epoch(epoch)
        for batch in data:
            _step(network.train(), batch, optimizer, bfloat16=training.bfloat16)
            cycle.step()
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "cycle": cycle.state_dict()}
        torch.save({**state, "epochs": epoch + 1}, part)
        score = accuracy(network.eval(), cifar().validation)
        print(f"{name}, epoch {epoch + 1}: {score:.2f} %, {time.perf_counter() - start:.0f} s", flush=True)
    finished = training.finished(network) if training.finished else network
    tensors = {key: value.contiguous() for key, value in finished.state_dict().items()}
    save_file(tensors, weights(name), {"validation_accuracy": f"{accuracy(finished.eval(), cifar().validation):.2f}"})
    part.unlink()


def _resume(part: Path, network: nn.Module, optimizer: Any, cycle: Any) -> int:
    """Load a checkpoint if there is one; return the number of complete epochs."""
    part.parent.mkdir(exist_ok=True)
    if not part.exists():
        return 0
    state = torch.load(part, weights_only=True)
    network.load_state_dict(state["network"])
    optimizer.load_state_dict(state["optimizer"])
    cycle.load_state_dict(state["cycle"])
    return state["epochs"]


def _step(network: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, *, bfloat16: bool) -> None:
    images: Tensor = batch.images.contiguous(memory_format=torch.channels_last)
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = network(images)
    loss = F.cross_entropy(logits.float(), batch.targets)
    loss.backward()
    optimizer.step()


@dataclass(frozen=True)
class CachedSubject(Subject):
    """A network of this file, with its weights from the cache."""

    def network(self) -> nn.Module:
        """Return a new copy in eval mode."""
        return trained(self.name)


def subjects() -> dict[str, Subject]:
    """Return ResNet-20 and the networks whose weights are in the cache."""
    cached = {name: CachedSubject(name, 32, trained=True) for name in NETWORKS if weights(name).exists()}
    return {"resnet20": TRAINED["resnet20"], **cached}


@torch.inference_mode()
def accuracy(network: nn.Module, images: Images) -> float:
    """Return the accuracy in percent."""
    right = [
        (network(batch.images).argmax(1) == batch.targets).float().mean()
        for batch in Batches(images, 500, mean=MEAN, std=STD)
    ]
    return 100 * float(torch.stack(right).mean())


def main() -> None:
    """Train the networks that are not in the cache yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    for name in parser.parse_args().networks:
        if not weights(name).exists():
            train(name)


if __name__ == "__main__":
    main()
