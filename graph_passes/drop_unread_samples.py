"""Pool only the bins that strided 1x1 convolutions read.

Conv 1x1, stride s (RoiAlign[h,w](X, rois))  ->  Conv 1x1, stride 1 (RoiAlign[ceil(h/s), ceil(w/s)](X, rois'))
rois' are wider by s - 1 bins, so that the samples that are left stay where they were. One sample a bin; every reader of the
RoiAlign has the same stride, or the bins are read after all. (Networks in caffe's form, with the stride in the first 1x1.)
"""
from __future__ import annotations

from graph_passes.graph import Graph
from graph_passes.pass_manager import GraphPass, PassContext, PassResult
from graph_passes.roi_align_node import coarser_rois, grid, pointwise_reader, readers, strided_grid, why_not_coarser


class DropUnreadSamples(GraphPass):
    """RoiAlign read with a stride -> RoiAlign of a coarser grid."""

    name = "drop_unread_samples"

    def run(self, graph: Graph, context: PassContext) -> PassResult:
        """Rewrite every match; a second run finds nothing to do."""
        changed, notes = 0, []
        for node in graph.nodes_of("RoiAlign"):
            found = [pointwise_reader(reader, node.outputs[0]) for reader in readers(graph, node)]
            strides = {conv.stride if conv else 1 for conv in found}
            if graph.is_output(node.outputs[0]) or len(strides) != 1 or strides == {1}:
                continue
            reason = why_not_coarser(graph, node)
            if reason:
                notes.append(f"{graph.describe(node)} left: {reason}")
                continue
            stride = strides.pop()
            node.inputs[1] = coarser_rois(graph, node, stride)
            before, kept = grid(node), strided_grid(node, stride)
            node.attrs["output_height"], node.attrs["output_width"] = kept
            node.outputs[0].shape = [*node.outputs[0].shape[:2], *kept]
            for conv in filter(None, found):
                conv.node.attrs["strides"] = [1, 1]
            notes.append(f"{graph.describe(node)}: {before[0]} x {before[1]} bins, of which {kept[0]} x {kept[1]} are read")
            changed += 1
        return PassResult(changed, notes)
