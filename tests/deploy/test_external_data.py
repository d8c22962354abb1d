"""External data of an ONNX file is read from the folder of the file only."""

import numpy as np
import pytest
from onnx import TensorProto, helper

from tersor.checkpoint.artifact import read_artifact, write_folder
from tersor.core.errors import InputError
from tersor.deploy.external_data import refuse_outside


def tensor(location):
    made = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[12, 1], data_location=TensorProto.EXTERNAL)
    made.external_data.add(key="location", value=location)
    return made


def network(location, *, inside_a_node=False):
    nodes = [helper.make_node("Flatten", ["x"], ["f"]), helper.make_node("Gemm", ["f", "w"], ["y"])]
    initializers = [tensor(location)]
    if inside_a_node:
        nodes.insert(0, helper.make_node("Constant", [], ["w"], value=initializers.pop()))
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 2, 2])]
    taken = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 1])]
    graph = helper.make_graph(nodes, "g", given, taken, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()


@pytest.mark.parametrize("inside_a_node", [False, True])
@pytest.mark.parametrize("location", ["/etc/hostname", "../secret.bin", "a/../../secret.bin", "link.bin", "\x00"])
def test_external_data_outside_the_folder_raises(tmp_path, location, inside_a_node):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret.bin").write_bytes(bytes(48))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    (folder / "model.onnx").write_bytes(network(location, inside_a_node=inside_a_node))
    advice = r"Export the network again with its weights inside the ONNX file, or beside it\.$"
    with pytest.raises(InputError, match=f"outside of its folder, and is refused. {advice}"):
        read_artifact(folder / "model.onnx")


def test_external_data_in_the_folder_is_accepted(tmp_path):
    (tmp_path / "weights.bin").write_bytes(np.zeros(12, np.float32).tobytes())
    (tmp_path / "model.onnx").write_bytes(network("weights.bin"))
    assert read_artifact(tmp_path / "model.onnx").model == tmp_path / "model.onnx"


def test_every_onnx_file_of_a_folder_is_checked(tmp_path):
    def fill(folder):
        (folder / "model.onnx").write_bytes(b"")
        (folder / "original.onnx").write_bytes(network("/etc/hostname"))

    with pytest.raises(InputError, match=r"original\.onnx refers to '/etc/hostname'"):
        read_artifact(write_folder(tmp_path / "out", fill))


def test_a_file_that_is_not_an_onnx_network_is_not_checked(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"network")
    refuse_outside(tmp_path / "model.onnx")
