"""Count the networks of torchvision and timm that lose half of their MACs and still compute the same otherwise.

For each network with random weights: `channel_pruning` to 0.52 of the MACs with its defaults; then a forward and a
backward pass in training mode, the ONNX file in ONNX Runtime against torch, and the pruned network against the masked
one, node by node. `reached` requires all of this at 1.9 times fewer MACs. torch-pruning's MagnitudePruner runs beside
it with its defaults, at half of every layer's channels except the last layer's.

Every network runs in its own process: a crash, a timeout or a lack of memory is a row too.

    python bench/coverage.py [--only PATTERN] [--library torchvision|timm] [--seconds 600]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import rows
from tersor.training.context import AttachContext
from wild import trained_like

SEED = 0
FEWER = 1.9
KEEP = 0.52
LARGEST = 1.5e9
"""The largest size of the weights, in bytes."""
SIZES = {"vit": 224, "maxvit": 224, "inception": 128, "swin": 224, "swin_v2": 256, "googlenet": 64}
SIDE = 64
TIMM = [
    *("beit_base_patch16_224", "caformer_s18", "cait_xxs24_224", "coat_lite_tiny", "coatnet_nano_rw_224"),
    *("convformer_s18", "convmixer_768_32", "convnext_atto", "convnextv2_atto", "cspresnet50", "darknet17"),
    *("davit_tiny", "deit_tiny_patch16_224", "densenet121", "dla34", "dpn48b", "edgenext_xx_small"),
    *("efficientformer_l1", "efficientnet_lite0", "ese_vovnet19b_dw", "fastvit_t8", "fbnetc_100"),
    *("focalnet_tiny_srf", "gcvit_xxtiny", "gernet_s", "ghostnet_050", "gmixer_12_224", "hardcorenas_a"),
    *("hgnet_tiny", "hgnetv2_b0", "hrnet_w18_small", "inception_next_tiny", "inception_resnet_v2"),
    *("inception_v4", "lcnet_050", "levit_128s", "mambaout_femto", "mixer_s32_224", "mnasnet_small"),
    *("mobilenetv4_conv_small", "nfnet_f0", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnety_002"),
    *("repvgg_a0", "repvit_m0_9", "res2net50_14w_8s", "resmlp_12_224", "resnest14d", "resnet10t", "resnetv2_50"),
    *("rexnet_100", "selecsls42", "semnasnet_050", "shvit_s1", "skresnet18", "spnasnet_100", "starnet_s1"),
    *("swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "tinynet_e"),
    *("tnt_s_patch16_224", "tresnet_m", "twins_pcpvt_small", "visformer_tiny", "vit_tiny_patch16_224"),
    *("vovnet39a", "xception41", "xcit_nano_12_p16_224", "eva02_tiny_patch14_224", "crossvit_tiny_240"),
    *("mobilevit_xxs", "vgg11", "hiera_tiny_224", "mvitv2_tiny", "tiny_vit_5m_224", "efficientvit_b0"),
    *("efficientvit_m0", "volo_d1_224", "sequencer2d_s", "nest_tiny", "eca_nfnet_l0", "swinv2_cr_tiny_ns_224"),
]


def networks(library: str) -> list[str]:
    """Return the network names, smaller networks first if the size is known."""
    if library == "timm":
        return [f"timm/{name}" for name in TIMM]
    import torchvision

    weights = {
        name: list(torchvision.models.get_model_weights(name))
        for name in torchvision.models.list_models(module=torchvision.models)
    }
    sizes = {name: min(each.meta["num_params"] for each in known) for name, known in weights.items()}
    known = sorted(sizes, key=lambda name: sizes[name])
    return [f"torchvision/{name}" for name in known if 4 * sizes[name] <= LARGEST]


def network(name: str) -> Any:
    """Build the network with random weights as if it were trained: no factor is 0, no statistics are 0 and 1."""
    import torch

    torch.manual_seed(SEED)
    library, _, builder = name.partition("/")
    if library == "timm":
        import timm

        model = timm.create_model(builder)
    else:
        import torchvision

        options = {"init_weights": False} if builder in {"googlenet", "inception_v3"} else {}
        model = torchvision.models.get_model(builder, **options)
    return trained_like(model)


def images(name: str, model: Any) -> Any:
    """Return two images of the size that the network expects, or small ones if it accepts any."""
    import torch

    builder = name.partition("/")[2]
    fixed = getattr(getattr(model, "patch_embed", None), "img_size", None) or getattr(model, "image_size", None)
    asked = getattr(model, "pretrained_cfg", {}).get("input_size", (3, SIDE, SIDE))[1]
    if name.startswith("timm/"):
        free = not getattr(model, "pretrained_cfg", {}).get("fixed_input_size", False)
        transformer = any(part in builder for part in ("vit", "former", "swin", "224", "240", "256", "cait", "coat"))
        side = 96 if free and not transformer and not fixed else asked
    else:
        side = next((SIZES[kind] for kind in sorted(SIZES, reverse=True) if builder.startswith(kind)), SIDE)
        side = fixed if isinstance(fixed, int) else side
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(SEED))


def ours(name: str) -> dict[str, Any]:
    """Prune with `channel_pruning` and return what was measured."""
    import torch

    from tersor.deploy.onnx import export
    from tersor.evaluation.costs import costs
    from tersor.graph.capture import capture
    from tersor.methods.channel_pruning import ChannelPruning
    from tersor.pruning.channel_groups import Cut, removal_difference

    model = network(name)
    inputs = images(name, model)
    found: dict[str, Any] = {"side": inputs.shape[-1]}
    before = costs(model, inputs).macs
    whole = capture(network(name), inputs)
    begun = time.perf_counter()
    attached = ChannelPruning(keep_macs=KEEP).attach(model, AttachContext(data=[inputs]))
    found["seconds"] = round(time.perf_counter() - begun, 2)
    pruned = attached.model.eval()
    found["fewer_macs"] = round(before / costs(pruned, inputs).macs, 3)
    found["left_whole"] = sum(note.startswith("not removed") for note in attached.notes)
    [removed] = pruned.meta["cuts"]
    cuts = [Cut(layer, axis, tuple(places)) for layer, axis, places in removed]
    found["cut_is_mask"] = removal_difference(whole, cuts, inputs) or True
    with torch.no_grad():
        expected = pruned(inputs)
    with tempfile.TemporaryDirectory() as folder:
        file = export(pruned, inputs, Path(folder) / "model.onnx")
        found["onnx_error"] = float(_distance(torch.as_tensor(_answers(file, inputs)), expected))
    given = pruned.train()(inputs)
    given = given if isinstance(given, torch.Tensor) else given[0]
    given.square().mean().backward()
    found["backward"] = all(each.grad is not None and bool(each.grad.isfinite().all()) for each in pruned.parameters())
    return found


def _answers(file: Path, inputs: Any) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0]


def _distance(found: Any, expected: Any) -> Any:
    return (found - expected).abs().max() / expected.abs().max()


def theirs(name: str) -> dict[str, Any]:
    """Prune with torch-pruning and return what was measured."""
    import torch
    import torch_pruning
    from torch import nn

    from tersor.evaluation.costs import costs

    model = network(name)
    inputs = images(name, model)
    before = costs(model, inputs).macs
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    begun = time.perf_counter()
    torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        pruning_ratio=0.5,
        round_to=8,
        ignored_layers=[last],
    ).step()
    seconds = time.perf_counter() - begun
    fewer = before / costs(model, inputs).macs
    given = model.train()(inputs)
    (given if isinstance(given, torch.Tensor) else given[0]).square().mean().backward()
    return {"fewer_macs": round(fewer, 3), "seconds": round(seconds, 2)}


def apart(task: str, name: str, seconds: float) -> dict[str, Any]:
    """Run in a separate process; `failed` holds the error, if any."""
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--task", task, "--only", name],
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {seconds:.0f} seconds"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()]
        return {"failed": (last[-1] if last else f"exit {done.returncode}")[:300]}
    return json.loads(lines[-1])


def reached(found: dict[str, Any]) -> bool:
    """Return whether one network passed every check."""
    return (
        "failed" not in found
        and found["fewer_macs"] >= FEWER
        and found["cut_is_mask"] is True
        and found["onnx_error"] <= 1e-3
        and found["backward"]
    )


def main() -> None:
    """Write one row for each network that has none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="*", help="pattern of library/builder")
    parser.add_argument("--library", choices=["torchvision", "timm"], action="append")
    parser.add_argument("--seconds", type=float, default=600, help="time limit per network and contender")
    parser.add_argument("--task", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        warnings.simplefilter("ignore")
        print(json.dumps({"ours": ours, "theirs": theirs}[options.task](options.only)))
        return
    rows.commit()  # read now: the checkout may change within hours; nothing is timed, so other benchmarks may run
    for library in options.library or ["torchvision", "timm"]:
        for name in networks(library):
            if fnmatchcase(name, options.only) and not rows.known("coverage", {"network": name}, anywhere=True):
                measure(name, options.seconds)


def measure(name: str, seconds: float) -> None:
    """Run both contenders on one network and write its row."""
    found = apart("ours", name, seconds)
    peer = apart("theirs", name, seconds)
    numbers = {"n": 1, "spread": None, "reached": reached(found), **found, "torch_pruning": peer}
    rows.add("coverage", {"network": name}, numbers, [SEED])
    print(name, "reached" if numbers["reached"] else "not reached", json.dumps(found), json.dumps(peer), flush=True)


if __name__ == "__main__":
    main()
