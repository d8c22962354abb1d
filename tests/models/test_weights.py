from __future__ import annotations

import argparse
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tersor.core.errors import InputError
from tersor.models import build, load_weights, normalization, save_weights

SHARED = Path(__file__).parents[2] / "../shared/models"


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(first, second):
    return list(first) == list(second) and all(torch.equal(first[key], second[key]) for key in first)


def refused(model, path) -> str:
    before = snapshot(model)
    with pytest.raises(InputError) as caught:
        load_weights(model, path)
    assert same(before, model.state_dict()), "the model was touched"
    return str(caught.value)


def small(classes=10):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, classes))


def test_saved_weights_are_loaded(tmp_path):
    model, other = small(), small()
    path = tmp_path / "new folder" / "weights.safetensors"
    save_weights(model, path, {"normalize_mean": "0,0,0"})
    assert load_weights(other, str(path)) == {"normalize_mean": "0,0,0"}
    assert same(model.state_dict(), other.state_dict())
    assert os.listdir(path.parent) == ["weights.safetensors"]  # noqa: PTH208


def test_saving_is_deterministic_and_compatible_with_safetensors(tmp_path):
    model, metadata = small(), {name: name for name in "fbadce"}
    files = [tmp_path / f"{number}.safetensors" for number in range(6)]
    for file in files:
        save_weights(model, file, metadata)
    assert len({file.read_bytes() for file in files}) == 1
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(files[0].stat().st_mode) == 0o666 & ~mask
    with safe_open(files[0], "pt") as opened:
        assert opened.metadata() == metadata
    assert load_file(files[0]).keys() == model.state_dict().keys()


def test_tensors_that_share_memory_or_are_not_contiguous_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last))
    model[1].weight = model[0].weight
    save_weights(model, tmp_path / "w.safetensors")
    before = snapshot(model)
    nn.init.zeros_(model[0].weight)
    load_weights(model, tmp_path / "w.safetensors")
    assert same(before, model.state_dict())


def test_a_failed_save_keeps_the_existing_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(small(), path)
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        save_weights(small(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.safetensors"]  # noqa: PTH208


def test_weights_are_saved_as_safetensors_only(tmp_path):
    with pytest.raises(InputError, match=r"Write '.*w\.safetensors'"):
        save_weights(small(), tmp_path / "w.pt")


@pytest.mark.parametrize("holder", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_checkpoints_are_loaded(tmp_path, holder, prefix, zipped):
    model, other = small(), small()
    state = {prefix + key: value for key, value in model.state_dict().items()}
    content = state if holder is None else {"epoch": 3, "best": 0.5, holder: state}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    assert load_weights(other, tmp_path / "w.pt") == {}
    assert same(model.state_dict(), other.state_dict())


def test_half_precision_weights_and_weights_without_batch_counters_are_loaded(tmp_path):
    model, other = small(), small()
    other[1].num_batches_tracked += 7
    state = {key: value.half() for key, value in model.state_dict().items() if "tracked" not in key}
    save_file(state, tmp_path / "w.safetensors")
    load_weights(other, tmp_path / "w.safetensors")
    assert other[3].weight.dtype == torch.float32
    assert torch.equal(other[3].weight, model[3].weight.half().float())
    assert int(other[1].num_batches_tracked) == 7


class Evil:
    def __reduce__(self):
        return (os.abort, ())


def write_files(folder: Path) -> dict[str, Path]:
    state = small().state_dict()
    torch.save(state, folder / "whole.pt")
    torch.save(state, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(small(), folder / "network.pt")
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1)}, folder / "args.pt")
    torch.save({"a": Evil()}, folder / "evil.pt")
    torch.save({"epoch": 3, "best": 0.5}, folder / "epoch.pt")
    torch.save({0: torch.ones(1)}, folder / "number.pt")
    torch.save([torch.ones(1)], folder / "list.pt")
    torch.save({}, folder / "nothing.pt")
    (folder / "evil.pkl").write_bytes(pickle.dumps({"a": Evil()}))
    (folder / "empty.pt").touch()
    (folder / "empty.safetensors").touch()
    (folder / "text.pt").write_text("hello world")
    (folder / "text.safetensors").write_text("hello world, this is no file of tensors")
    (folder / "cut.pt").write_bytes((folder / "whole.pt").read_bytes()[:-300])
    (folder / "cut-legacy.pt").write_bytes((folder / "legacy.pt").read_bytes()[:-30])
    legacy = (folder / "legacy.pt").read_bytes()
    (folder / "half-legacy.pt").write_bytes(legacy[: len(legacy) // 2])
    save_file({"a": torch.ones(100)}, folder / "a.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "a.safetensors").read_bytes()[:-30])
    (folder / "pickle.safetensors").write_bytes((folder / "whole.pt").read_bytes())
    (folder / "folder.pt").mkdir()
    return {path.name: path for path in folder.iterdir()}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("weights"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("network.pt", "a Python object (torch.nn.modules.container.Sequential)"),
        ("args.pt", "a Python object (argparse.Namespace)"),
        ("evil.pt", "is refused because reading it would run code"),
        ("evil.pkl", "torch.save(model.state_dict(), 'weights.pt')"),
        ("epoch.pt", "a dict with 'epoch': int, 'best': float"),
        ("number.pt", "a dict with 0: Tensor"),
        ("list.pt", "a value of type list"),
        ("nothing.pt", "holds no tensors"),
        ("empty.pt", "is empty"),
        ("empty.safetensors", "is empty"),
        ("text.pt", "is not a weights file"),
        ("text.safetensors", "not a safetensors file"),
        ("cut.pt", "is truncated"),
        ("cut-legacy.pt", "is truncated"),
        ("half-legacy.pt", "is truncated"),
        ("cut.safetensors", "is truncated"),
        ("pickle.safetensors", "not a safetensors file"),
        ("folder.pt", "cannot be read"),
    ],
)
def test_invalid_files_raise(files, name, words):
    message = refused(small(), files[name])
    assert words in message
    assert str(files[name]) in message


def test_a_missing_file_suggests_a_similar_name(files):
    missing = files["whole.pt"].with_name("whol.pt")
    assert f"Did you mean '{files['whole.pt']}'?" in refused(small(), missing)
    assert "there is no weights file" in refused(small(), missing.parent / "no folder" / "w.pt")


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(["whole.pt", "legacy.pt", "a.safetensors"]))
def test_damaged_files_raise_input_error_or_load(files, data, name):
    content = bytearray(files[name].read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = files[name].with_name(f"damaged-{name}")
    damaged.write_bytes(content)
    try:
        load_weights(small(), damaged)
    except InputError as error:
        assert str(damaged) in str(error)  # noqa: PT017


def test_the_error_lists_missing_unexpected_and_wrongly_shaped_weights(tmp_path):
    save_weights(nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Linear(4, 10)), tmp_path / "w.safetensors")
    message = refused(small(), tmp_path / "w.safetensors")
    assert "6 missing: 1.weight, 1.bias, 1.running_mean, 1.running_var, ...." in message
    assert "2 unexpected: 2.bias, 2.weight." in message
    assert (
        "2 of another shape: 0.weight (5x3x3x3 in the file, 4x3x3x3 here), 0.bias (5 in the file, 4 here)." in message
    )


@pytest.mark.parametrize(("name", "in_file", "here"), [("resnet20", 10, 100), ("squeezenet1_1", 3, 10)])
def test_a_wrong_number_of_classes_is_recognized(tmp_path, name, in_file, here):
    save_weights(build(name, in_file), tmp_path / "w.safetensors")
    message = refused(build(name, here), tmp_path / "w.safetensors")
    assert f"has weights for {in_file} classes, but the network was built for {here} (num_classes, or the" in message
    assert message.endswith(f"In Python, build the network with num_classes={in_file}.")


def test_a_different_input_width_of_the_last_layer_is_not_reported_as_classes(tmp_path):
    save_weights(nn.Sequential(nn.Linear(3, 4)), tmp_path / "w.safetensors")
    assert "of another shape" in refused(nn.Sequential(nn.Linear(5, 4)), tmp_path / "w.safetensors")


def test_the_error_names_the_cifar_resnet_that_the_file_fits(tmp_path):
    save_weights(build("resnet56", 100), tmp_path / "w.safetensors")
    message = refused(build("resnet20", 10), tmp_path / "w.safetensors")
    assert "216 unexpected: layer1.3." in message
    assert "The file fits resnet56 with num_classes: 100." in message
    assert "The file fits resnet56" in refused(build("resnet18"), tmp_path / "w.safetensors")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared weights are not beside the checkout")
@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_the_shared_weights_are_loaded(name):
    metadata = load_weights(build(name, 10), SHARED / f"{name}-cifar10-jpeg.safetensors")
    assert normalization(metadata) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_normalization_is_read_from_the_metadata():
    assert normalization({"architecture": "resnet20"}) is None
    assert normalization({"normalize_mean": "0, 0.5,1", "normalize_std": "1,1,2"}) == ((0, 0.5, 1), (1, 1, 2))


@pytest.mark.parametrize(
    ("mean", "std", "words"),
    [
        ("0.5,0.5", "1,1,1", "normalize_mean"),
        ("0.5,0.5,x", "1,1,1", "normalize_mean"),
        ("0,0,0", "nan,1,1", "normalize_std"),
        ("0,0,0", "1,0,1", "Possible: numbers above 0"),
        ("0,0,0", None, "normalize_std"),
    ],
)
def test_a_normalization_without_a_number_per_channel_raises(mean, std, words):
    metadata = {"normalize_mean": mean} | ({} if std is None else {"normalize_std": std})
    with pytest.raises(InputError, match=words):
        normalization(metadata)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_of_an_unsupported_dtype_raise(tmp_path, dtype):
    network = torch.nn.Linear(3, 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    torch.save({**before, "weight": torch.ones(2, 3).to(dtype)}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"weight is torch\.\w+ in the file and torch\.float32 in the network\. Save it"
    ):
        load_weights(network, tmp_path / "w.pt")
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_sparse_weights_raise(tmp_path):
    torch.save({"weight": torch.eye(2).to_sparse(), "bias": torch.zeros(2)}, tmp_path / "w.pt")
    with pytest.raises(InputError, match="weight is a sparse tensor"):
        load_weights(torch.nn.Linear(2, 2), tmp_path / "w.pt")


def test_complex_weights_are_loaded_into_complex_parameters(tmp_path):
    def filtered(values):
        network = torch.nn.Module()
        network.filter = torch.nn.Parameter(values)
        return network

    saved = filtered(torch.randn(3, 2, dtype=torch.complex64))
    fresh = filtered(torch.zeros(3, 2, dtype=torch.complex64))
    torch.save(saved.state_dict(), tmp_path / "w.pt")
    load_weights(fresh, tmp_path / "w.pt")
    assert torch.equal(fresh.filter, saved.filter)
    with pytest.raises(InputError, match=r"filter is torch\.complex64 in the file and torch\.float32 in the network"):
        load_weights(filtered(torch.zeros(3, 2)), tmp_path / "w.pt")
