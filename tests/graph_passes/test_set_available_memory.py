"""set_available_memory: which nodes get the proportion, and that it is PopART's to default."""
from placement_graphs import Builder, context

from graph_passes.set_available_memory import SetAvailableMemory


def proportions(available_memory, runs=1):
    b = Builder()
    x = b.input("image", [1, 16, 4])
    x = b.node("MatMul", [x, b.weight("w", [4, 4])], "product", [1, 16, 4])
    b.output(b.node("Relu", [x], "relu", [1, 16, 4]))
    graph = b.graph("infer", [])
    options = context("infer", graph, ipus=1, available_memory=available_memory)
    results = [SetAvailableMemory().run(graph, options) for _ in range(runs)]
    return {node.op: node.attrs.get("__available_memory") for node in graph.nodes}, [result.changed for result in results]


def test_matrix_products_get_the_proportion_once():
    assert proportions(0.25, runs=2) == ({"MatMul": 0.25, "Relu": None}, [1, 0])


def test_without_a_setting_popart_decides():
    assert proportions(None) == ({"MatMul": None, "Relu": None}, [0])
