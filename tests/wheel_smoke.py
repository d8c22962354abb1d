"""A check by `make wheel` in an environment with only the wheel: `python -P wheel_smoke.py`, in any folder."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import resources
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
RECIPE = """\
model: {name: resnet20, num_classes: 10, weights: weights.safetensors}
data: {name: digits}
stages:
  - {name: quantize, methods: [{ptq: {calibration_images: 64}}]}
"""


def tersor(*arguments: str) -> str:
    """The output of the installed command."""
    command = Path(sys.executable).with_name("tersor")
    done = subprocess.run([command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    import torch

    import tersor as package

    installed = Path(package.__file__).parent
    assert installed.is_relative_to(sys.prefix), f"{installed} is not in {sys.prefix}"
    assert not installed.is_relative_to(CHECKOUT / "src"), installed
    files = {file.name for file in resources.files("tersor.report").joinpath("templates").iterdir()}
    assert {"page.html", "sensitivity_map.svg", "style.css"} <= files, files
    assert resources.files("tersor").joinpath("py.typed").is_file()
    assert "Usage" in tersor("--help")
    assert "soft_targets" in tersor("methods")

    from tersor import models

    folder = Path(tempfile.mkdtemp())
    os.chdir(folder)
    network, images = models.build("resnet20", 10).eval(), torch.rand(8, 3, 16, 16)
    package.export(package.quantize(network, [images]), images, "model.onnx")
    models.save_weights(network, folder / "weights.safetensors")
    Path("recipe.yaml").write_text(RECIPE)
    tersor("run", "recipe.yaml", "--out", "run")
    assert json.loads(Path("run/numbers.json").read_text())["artifact"]["bytes"] > 0
    assert "<html" in Path("run/report.html").read_text()
    shutil.rmtree(folder)
    sys.stdout.write(f"tersor {package.__version__} works from {installed}\n")


if __name__ == "__main__":
    main()
