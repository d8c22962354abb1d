"""The exporter's table of operators is built once."""

from torch.onnx._internal.exporter._registration import ONNXRegistry

from tersor.deploy.onnx import OPSET
from tersor.deploy.operator_table import one_operator_table


def table():
    return ONNXRegistry().from_torchlib(opset_version=OPSET)


def entries(of_table):
    return [id(each) for found in of_table.functions.values() for each in found]


def test_every_export_gets_its_own_copy_of_the_operator_table():
    with one_operator_table():
        first, second = table(), table()
    built = table()
    assert built.opset_version == first.opset_version == OPSET
    described = [
        {name: [str(each) for each in found] for name, found in each.functions.items()} for each in (built, first)
    ]
    assert described[0] == described[1]
    assert entries(first) == entries(second) != entries(built)
    name = next(iter(built.functions))
    first.functions[name].clear()
    assert second.functions[name]
