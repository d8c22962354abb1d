"""The structure of the source code: levels, sizes, names, and allowed imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tersor"
FILES = sorted(SOURCE.rglob("*.py"))
LEVELS = [
    ("__main__", "cli", "cli_run", "cli_compress", "cli_pick", "cli_bench", "cli_output", "progress_bars", "tracking"),
    ("api",),
    ("search",),
    ("pipeline",),
    ("report",),
    ("recipe", "checkpoint"),
    ("methods",),
    ("training.dynamic_masks", "training.method"),
    (
        "training.hook_names",
        "training.loop",
        "training.loss_warmup",
        "training.mask_attachment",
        "training.reconstruction_attachment",
        "training.removal_attachment",
    ),
    (
        "training.attachment",
        "training.class_logits",
        "training.norm_statistics",
        "training.normalization_check",
        "training.optimizer",
        "training.output_distance",
        "training.precision",
        "training.schedule",
        "training.snapshot",
        "training.teacher_cache",
        "training.validation_curve",
    ),
    (
        "training.context",
        "training.ema",
        "training.history",
        "training.layer_pairs",
        "training.mask_log",
        "training.objective",
        "training.options",
        "training.teacher_check",
    ),
    ("evaluation",),
    ("deploy",),
    ("pruning.budget", "pruning.channel_importance"),
    (
        "pruning.channel_selection",
        "pruning.least_squares",
        "pruning.optimal_brain_surgeon",
        "pruning.residual_branches",
    ),
    ("pruning.channel_groups",),
    ("pruning.dependency.layer_rules",),
    ("pruning.dependency.arithmetic_rules", "pruning.dependency.search"),
    ("pruning.channel_removal", "pruning.dependency.shape_rules"),
    (
        "pruning.dependency.groups",
        "pruning.dependency.removal_check",
        "pruning.dependency.slice_rules",
        "pruning.dependency.split_axes",
    ),
    ("pruning.dense_path", "pruning.dependency.propagation", "pruning.weight_importance"),
    (
        "pruning.activation_moments",
        "pruning.dependency.shape_recording",
        "pruning.dependency.union_find",
        "pruning.output_changes",
        "pruning.topk",
    ),
    (
        "quantization.accuracy_control",
        "quantization.calibration",
        "quantization.reconstruction",
        "quantization.sensitivity",
    ),
    ("quantization.output_error", "quantization.product_error"),
    (
        "quantization.bias_correction",
        "quantization.blocks",
        "quantization.equalization",
        "quantization.integer_coverage",
        "quantization.quantizers",
    ),
    ("quantization.operators", "quantization.runtime_defects"),
    ("quantization.qdq_placement",),
    ("quantization.fake_quantize", "quantization.output_rounding", "quantization.quantizer_options"),
    (
        "quantization.activation_products",
        "quantization.expansions",
        "quantization.grid_distance",
        "quantization.observers",
        "quantization.range_tracking",
        "quantization.straight_through",
    ),
    ("quantization.grid",),
    ("pruning.mask",),
    ("models",),
    ("graph.fused_inference",),
    ("graph.batchnorm_behind", "graph.matrix_products"),
    ("graph.capture",),
    ("graph.modes",),
    ("graph.export_program",),
    (
        "graph.batch_constants",
        "graph.batchnorm_statistics",
        "graph.common_operators",
        "graph.comparison",
        "graph.custom_gradients",
        "graph.feature_extraction",
        "graph.fingerprint",
        "graph.inlined_regions",
        "graph.layer_restoration",
        "graph.plain_attention",
        "graph.plain_checkpointing",
        "graph.plain_network",
    ),
    ("graph.computed_weights", "graph.dropout_calls"),
    (
        "graph.aten",
        "graph.batchnorm",
        "graph.dead_code",
        "graph.eval_mode",
        "graph.layer_selection",
        "graph.multiplications",
        "graph.original_keys",
        "graph.parametrization",
        "graph.plain_modules",
        "graph.stack_traces",
        "graph.stored_functions",
    ),
    ("graph.forward_call",),
    ("tasks",),
    ("data",),
    ("core",),
]
"""From the top down. A module imports only what is on a lower level; `docs/architecture.md` shows this list.

The modules of the top level may import each other. So may those of one folder, except in `methods` and in the four
folders that are divided into several levels.
"""


def name_of(file):
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module):
    """The number of its level, counted from the bottom, and its entry in `LEVELS`."""
    path = module.removeprefix("tersor.")
    entries = {entry: len(LEVELS) - place for place, row in enumerate(LEVELS) for entry in row}
    own = [entry for entry in entries if path == entry or path.startswith(f"{entry}.")]
    assert own, f"{module} has no level"
    longest = max(own, key=len)
    return entries[longest], longest


def imports(tree):
    """The full name of every imported module or name, at the top or inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "an import that begins with a dot hides its level"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def misplaced(importer, imported):
    """Whether `importer` is not allowed to import `imported`."""
    if importer == "tersor":  # loads each verb when it is first used
        return False
    (own, own_entry), (other, other_entry) = level(importer), level(imported)
    return not (other < own or (other == own and (own_entry == other_entry or own_entry in LEVELS[0])))


IMPORTS = {name_of(file): list(imports(ast.parse(file.read_text()))) for file in FILES}
LIGHT = [
    ("tersor", ["torch", "numpy", "pydantic"]),
    *[(f"tersor.core.{name}", ["torch", "onnx"]) for name in ("errors", "progress", "target")],
    ("tersor.training.options", ["torch", "onnx"]),
    *[(f"tersor.{name}", ["torch", "onnx"]) for name in ("recipe", "methods", "cli")],
    ("tersor.checkpoint.artifact", ["torch", "onnx"]),
    *[(f"tersor.evaluation.{name}", ["torch", "onnx"]) for name in ("latency", "process_footprint")],
]
"""Modules that start fast or run without torch, and the packages that they must not import."""


@pytest.mark.parametrize(
    ("importer", "imported", "wrong"),
    [
        ("tersor.quantization.grid", "tersor.core.errors", False),
        ("tersor.graph.capture", "tersor.quantization.grid", True),
        ("tersor.quantization.reconstruction", "tersor.pruning.mask.Mask", False),
        ("tersor.quantization.reconstruction", "tersor.pruning.channel_groups", True),
        ("tersor.graph.capture", "tersor.core.errors", False),
        ("tersor.graph.capture", "tersor.models.build", True),
        ("tersor.methods.ptq", "tersor.training.loop.fit", False),
        ("tersor.methods.ptq", "tersor.checkpoint.store", True),
        ("tersor.pipeline.run", "tersor.recipe.Recipe", False),
        ("tersor.recipe", "tersor.cli.main", True),
        ("tersor.cli", "tersor.pipeline.run.run", False),
    ],
)
def test_misplaced_compares_the_levels_of_two_modules(importer, imported, wrong):
    assert misplaced(importer, imported) is wrong


def test_modules_import_only_from_lower_levels():
    wrong = [
        f"{importer} imports {name}"
        for importer, names in IMPORTS.items()
        for name in names
        if name.split(".")[0] == "tersor" and name != "tersor" and misplaced(importer, name)
    ]
    assert not wrong


def test_the_architecture_page_lists_the_levels():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    (listed,) = re.findall(r"^```levels\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [tuple(line.split(", ")) for line in listed.splitlines()] == LEVELS


def test_the_architecture_page_lists_every_folder():
    page = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
    folders = {path.parent.name for path in SOURCE.glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/ ", page, re.MULTILINE)) == folders


def test_a_method_does_not_import_another_method():
    files = [name_of(file) for file in (SOURCE / "methods").glob("[!_]*.py")]
    wrong = [
        f"{own} imports {name}"
        for own in files
        for name in IMPORTS[own]
        if name.startswith("tersor.methods.") and not name.startswith(f"{own}.")
    ]
    assert files
    assert not wrong


def test_other_compression_libraries_are_not_imported():
    """Other libraries are used for comparison in `bench/` only."""
    peers = ("nncf", "onnxruntime.quantization", "neural_compressor", "torchao", "torch_pruning")
    wrong = [
        f"{importer} imports {name}"
        for importer, names in IMPORTS.items()
        for name in names
        if any(name == peer or name.startswith(f"{peer}.") for peer in peers)
    ]
    assert not wrong
    spelled = ("onnxruntime.quantization", "quantize_static")
    assert not [file for file in FILES for each in spelled if each in file.read_text()]


def test_light_modules_import_no_torch():
    """One process for all of them, starting with the lightest. `tersor --help` has to appear immediately."""
    code = f"""
import importlib, sys
for name, heavy in {LIGHT!r}:
    importlib.import_module(name)
    assert not sys.modules.keys() & set(heavy), name
sys.argv = ["tersor", "--help"]
try:
    sys.modules["tersor.cli"].main()
except SystemExit as ended:
    assert not ended.code
assert "torch" not in sys.modules, "--help"
from tersor import methods, recipe
recipe.parse("{{model: {{name: a}}, data: {{name: digits}}, stages: [{{name: s}}]}}", "a recipe without methods")
methods.names()
assert "torch" not in sys.modules, "names of methods"
methods.get("soft_targets")
assert "tersor.methods.ptq" not in sys.modules, "only the named file"
from tersor.models import build
build("resnet20")
assert "torchvision" not in sys.modules, "our own networks"
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_file_of_more_than_300_lines_states_the_reason():
    for file in FILES:
        lines = file.read_text().splitlines()
        assert len(lines) <= 300 or "lines" in lines[0], f"{name_of(file)}: {len(lines)} lines"


def test_only_the_command_line_sets_the_allocator():
    users = [module for module, names in IMPORTS.items() if "tersor.core.device.keep_freed_memory" in names]
    assert users == ["tersor.cli_compress", "tersor.cli_run"]


def test_vague_file_names_are_not_used():
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "base", "tools", "lib"}
    assert not [file for file in FILES if vague & {*file.relative_to(SOURCE).parts, file.stem}]


def test_the_package_contains_py_typed():
    assert (SOURCE / "py.typed").is_file()


def test_file_names_are_unique():
    names = [file.name for file in FILES if file.name != "__init__.py"]
    assert not {name for name in names if names.count(name) > 1}
