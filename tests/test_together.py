"""Channel pruning, dynamic masks and quantization in successive stages with a teacher: the contents of the file."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import save_file

from tersor.checkpoint.store import Checkpoints
from tersor.core.progress import NullProgress
from tersor.deploy.onnx import export
from tersor.evaluation.costs import costs
from tersor.evaluation.scoring import file_predictions
from tersor.evaluation.session import open_session
from tersor.pipeline.setup import prepare
from tersor.pipeline.stages import run_stages
from tersor.pruning.mask import weight_mask
from tersor.recipe import read
from toy_networks import resnet8

RECIPE = Path(__file__).parents[1] / "recipes" / "cifar10-resnet56-sparse.yaml"


def test_masked_weights_are_zero_in_the_file_and_it_runs(tmp_path):
    torch.manual_seed(0)
    original = resnet8().eval()
    save_file(original.state_dict(), tmp_path / "weights.safetensors")
    model = f"{{name: 'toy_networks:resnet8', num_classes: 10, weights: {tmp_path / 'weights.safetensors'}}}"
    brief = [f"stages.{number}.steps={steps}" for number, steps in enumerate((2, 48, 4))]
    small = [f"stages.{number}.batch_size=16" for number in range(3)]
    recipe = read(RECIPE, [f"model={model}", "data={name: digits, limit: 256}", *brief, *small])
    experiment = prepare(recipe, model=None, data=None, progress=NullProgress())
    model, _ = run_stages(experiment, Checkpoints(tmp_path / "checkpoints"), NullProgress())

    images = next(iter(experiment.batches(experiment.data.test, 64))).images.contiguous()
    assert costs(model, images).macs <= 0.502 * costs(original, images).macs
    masks = {name: mask for name, layer in model.named_modules() if (mask := weight_mask(layer)) is not None}
    weights = sum(mask.mask.numel() for mask in masks.values())
    assert abs(sum(int((~mask.mask).sum()) for mask in masks.values()) - 0.8 * weights) <= 0.5, "four fifths, exactly"

    file = export(model, images, tmp_path / "model.onnx")
    stored = {each.name: numpy_helper.to_array(each) for each in onnx.load(file).graph.initializer}
    kernels = [each for each in stored.values() if each.dtype == np.int8 and each.ndim == 4]
    assert len(kernels) == len(masks)
    for kernel, mask in zip(kernels, masks.values(), strict=True):
        assert not kernel[~mask.mask.numpy()].any(), "what is masked is zero"
        assert kernel[mask.mask.numpy()].any()
    outputs = file_predictions(open_session(file, "onnxruntime"), [images.numpy()])
    with torch.no_grad():
        expected = model(images).argmax(1).numpy()
    assert (np.asarray(outputs) == expected).mean() >= 0.9
