"""Networks that others wrote, with random weights, for `bench/wild.py`: name -> its builder and its image size.

They come from torchvision, timm, pytorchcv, efficientnet_pytorch, pretrainedmodels, vit-pytorch,
segmentation-models-pytorch, transformers and MONAI. Nothing is downloaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

CLASSES = 10
Builder = Callable[[], nn.Module]
NETWORKS: dict[str, tuple[Builder, int]] = {}


def _add(library: str, names: str, build: Callable[[str], nn.Module], size: int = 64) -> None:
    for name in names.split():
        NETWORKS[f"{library}/{name}"] = (lambda name=name: build(name)), size


def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    if name in {"googlenet", "inception_v3"}:
        options["init_weights"] = False
    return torchvision.models.get_model(name, weights=None, **options)


def _segmentation(name: str) -> nn.Module:
    return _torchvision(name, weights_backbone=None)


def _backbone(name: str) -> Any:
    return _torchvision(name, weights_backbone=None).backbone


def _timm(name: str, **options: Any) -> nn.Module:
    return importlib.import_module("timm").create_model(name, pretrained=False, num_classes=CLASSES, **options)


def _pytorchcv(name: str) -> nn.Module:
    return importlib.import_module("pytorchcv.model_provider").get_model(name, pretrained=False)


def _class(path: str, **options: Any) -> nn.Module:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)(**options)


def _smp(name: str) -> nn.Module:
    kind, _, encoder = name.partition("/")
    return _class(
        f"segmentation_models_pytorch:{kind}", encoder_name=encoder or "resnet18", encoder_weights=None, classes=5
    )


def _transformers(name: str, **options: Any) -> nn.Module:
    kind = getattr(importlib.import_module("transformers"), name)
    return kind(kind.config_class(**options))


_add(
    "torchvision",
    "vgg11_bn squeezenet1_1 resnext50_32x4d densenet121 mobilenet_v2 mobilenet_v3_small mnasnet0_5 googlenet "
    "shufflenet_v2_x0_5 efficientnet_b0 regnet_y_400mf convnext_tiny swin_t",
    _torchvision,
)
_add("torchvision", "alexnet inception_v3", _torchvision, 96)
_add("torchvision", "maxvit_t", _torchvision, 224)
_add("torchvision", "swin_v2_t", _torchvision, size=256)  # with fewer pixels, most tokens are padding
_add("torchvision", "vit_b_32", lambda name: _torchvision(name, image_size=64))
_add("torchvision", "lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50", _segmentation)
_add("torchvision backbone", "ssdlite320_mobilenet_v3_large", _backbone, 320)
_add("torchvision backbone", "fcos_resnet50_fpn", _backbone)
_add(
    "timm",
    "resnet18 resnetv2_50 tf_efficientnet_lite0 tf_efficientnetv2_b0 mobilenetv4_conv_small mobilenetv3_small_100 "
    "regnetx_002 repvgg_a0 mobileone_s0 ghostnetv2_100 convnextv2_atto edgenext_xx_small hardcorenas_a dla34 "
    "hrnet_w18_small res2net50_14w_8s nf_regnet_b0 lcnet_050 tinynet_e fbnetv3_b inception_next_atto pvt_v2_b0 "
    "poolformerv2_s12 rexnet_100 vovnet39a starnet_s1 repghostnet_050 cspresnet50 selecsls42b mobilevit_xxs "
    "efficientvit_b0 fastvit_t8 xcit_nano_12_p16_224",
    _timm,
)
_add("timm", "vit_tiny_patch16_224 deit_tiny_patch16_224 mixer_s32_224", lambda name: _timm(name, img_size=64))
_add("timm", "coat_lite_tiny", lambda name: _timm(name, img_size=64))
_add("timm", "beit_base_patch16_224", lambda name: _timm(name, img_size=64, depth=2))
_add("timm", "swin_tiny_patch4_window7_224", lambda name: _timm(name, img_size=56), 56)
_add("timm", "eva02_tiny_patch14_224", lambda name: _timm(name, img_size=56), 56)
_add("timm", "crossvit_tiny_240", _timm, 240)
_add("timm", "levit_128s efficientformer_l1 tiny_vit_5m_224 mvitv2_tiny", _timm, 224)
_add(
    "pytorchcv",
    "resnet10 preresnet10 seresnet10 mobilenet_w1 menet108_8x1_g3 condensenet74_c4_g4 igcv3_w1 diracnet18v2 peleenet",
    _pytorchcv,
    224,
)
NETWORKS.update(
    {
        "efficientnet_pytorch/b0": (
            lambda: importlib.import_module("efficientnet_pytorch").EfficientNet.from_name("efficientnet-b0"),
            64,
        ),
        "pretrainedmodels/bninception": (lambda: _class("pretrainedmodels:bninception", pretrained=None), 224),
        "monai/UNet": (
            lambda: _class(
                "monai.networks.nets:UNet",
                spatial_dims=2,
                in_channels=3,
                out_channels=2,
                channels=(8, 16, 32),
                strides=(2, 2),
            ),
            64,
        ),
    }
)
_VIT: dict[str, Any] = {"image_size": 64, "patch_size": 16, "num_classes": CLASSES, "dim": 64, "depth": 2, "heads": 4}
NETWORKS.update(
    {
        f"vit-pytorch/{kind}": ((lambda path=path, options=options: _class(path, **options)), 64)
        for kind, path, options in (
            ("ViT", "vit_pytorch.vit:ViT", {**_VIT, "mlp_dim": 128}),
            ("SimpleViT", "vit_pytorch.simple_vit:SimpleViT", {**_VIT, "mlp_dim": 128}),
            ("DeepViT", "vit_pytorch.deepvit:DeepViT", {**_VIT, "mlp_dim": 128}),
            ("CvT", "vit_pytorch.cvt:CvT", {"num_classes": CLASSES}),
        )
    }
)
_add("segmentation_models_pytorch", "Unet UnetPlusPlus FPN DeepLabV3Plus PSPNet Linknet Unet/mobilenet_v2", _smp)
_SMALL: dict[str, Any] = {"image_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1]}
_WIDTHS: dict[str, Any] = {**_STAGES, "hidden_sizes": [16, 32, 64, 64]}
_RESNET = {**_WIDTHS, "embedding_size": 16, "out_features": ["stage4"]}
NETWORKS.update(
    {
        f"transformers/{name}": ((lambda name=name, options=options: _transformers(name, **options)), size)
        for name, size, options in (
            ("ViTForImageClassification", 64, {**_SMALL, "intermediate_size": 128}),
            ("DeiTForImageClassification", 64, {**_SMALL, "intermediate_size": 128}),
            ("Dinov2ForImageClassification", 56, {**_SMALL, "image_size": 56}),
            (
                "SwinForImageClassification",
                64,
                {**_STAGES, "image_size": 64, "embed_dim": 32, "num_heads": [2, 2, 4, 4], "window_size": 2},
            ),
            ("ConvNextV2ForImageClassification", 64, _WIDTHS),
            ("ResNetForImageClassification", 64, {**_WIDTHS, "embedding_size": 16}),
            ("MobileViTForImageClassification", 64, {"image_size": 64}),
            ("MobileNetV2ForImageClassification", 64, {}),
            ("SegformerForSemanticSegmentation", 64, _STAGES),
            ("PvtV2ForImageClassification", 64, _STAGES),
        )
    }
)


def _detr() -> nn.Module:
    transformers = importlib.import_module("transformers")
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 64)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4)
    return _transformers(
        "DetrForObjectDetection",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=transformers.ResNetConfig(**_RESNET),
        encoder_layers=1,
        decoder_layers=1,
        **widths,
        **heads,
    )


NETWORKS["transformers/DetrForObjectDetection"] = _detr, 64
