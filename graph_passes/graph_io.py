"""ONNX in and out: a thin wrapper over onnx-graphsurgeon that keeps what graphsurgeon drops.

Kept: `metadata_props` of nodes and model, opset imports of every domain, references to external weights (the bytes in
weights.safetensors are never loaded, copied or rewritten), shapes and types of intermediate tensors, node order.
"""
from __future__ import annotations

import filecmp
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, Dict, Iterable, Optional, Union

import numpy as np
import onnx
import onnx.inliner
import onnx_graphsurgeon as gs

from graph_passes.graph import Graph
from runtime.errors import BadInputFile, GraphError

__all__ = ["Graph", "external_location", "load_graph", "load_model", "save_graph", "save_model"]


def load_graph(source: Union[str, Path, onnx.ModelProto]) -> Graph:
    """Read an ONNX file (or take a ModelProto, which stays untouched) as a Graph.

    Raises BadInputFile when the file is missing, truncated, corrupt, or its external weights are.
    """
    if isinstance(source, onnx.ModelProto):
        model, folder, label = source, None, "model"
    else:
        model, folder, label = load_model(source), Path(source).resolve().parent, str(source)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    _check_wiring(model.graph, label)
    try:
        imported = gs.import_onnx(model)
    except Exception as error:  # graphsurgeon trusts its input: damaged types and shapes fail anywhere in it
        raise BadInputFile(f"{label}: a damaged ONNX graph ({_one_line(error)}); export it again") from error
    imported.import_domains = [onnx.helper.make_opsetid(o.domain, o.version) for o in model.opset_import]
    _copy_metadata(model.graph, imported)
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    return Graph(imported, metadata=metadata, folder=folder)


def load_model(path: Union[str, Path]) -> onnx.ModelProto:
    """Parse an ONNX file without its external data; checks that the external data is there and long enough."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadInputFile(f"{path}: cannot be read ({error.strerror}); export the graph first") from error
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception as error:  # protobuf's DecodeError; its backends differ in what they raise
        raise BadInputFile(f"{path}: not an ONNX file, or truncated ({len(data)} bytes); export it again") from error
    if not model.ir_version or not model.HasField("graph") or not model.opset_import or not model.graph.output:
        raise BadInputFile(f"{path}: an incomplete ONNX file ({len(data)} bytes, graph or opset missing); export it again")
    if _has_undecodable_text(model):
        raise BadInputFile(f"{path}: a damaged ONNX file (a name in it is not UTF-8); export it again")
    _check_external(model, path)
    return model


def save_graph(graph: Graph, path: Union[str, Path]) -> None:
    """Write the graph atomically (temp file, fsync, rename).

    External weights keep their location, which ONNX reads relative to `path`: in another folder than the one the graph
    came from, the weights file is hard-linked (or copied) beside it first.
    """
    save_model(graph.to_model(), path, graph.folder)


def save_model(model: onnx.ModelProto, path: Union[str, Path], weights_folder: Optional[Path] = None) -> None:
    """Write a ModelProto atomically and deterministically; `weights_folder` is where its external data lies now."""
    path = Path(path)
    if path.is_dir():
        raise GraphError(f"{path}: is a folder; name the ONNX file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GraphError(f"{path.parent}: cannot be made a folder ({error.strerror})") from error
    if weights_folder is not None:
        for location in sorted(set(filter(None, map(external_location, model.graph.initializer)))):
            _bring_weights(weights_folder / location, path.parent / location)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise GraphError(f"{path}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(model.SerializeToString(deterministic=True))
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def external_location(tensor: onnx.TensorProto) -> Optional[str]:
    """File name that holds this tensor's bytes, None for an inline tensor."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return None
    return {entry.key: entry.value for entry in tensor.external_data}.get("location")


def _copy_metadata(source: onnx.GraphProto, target: gs.Graph) -> None:
    """Attach each NodeProto's metadata_props to the imported node as `node.metadata`; graphsurgeon drops them."""
    for proto, node in zip(source.node, target.nodes):
        node.metadata = {prop.key: prop.value for prop in proto.metadata_props}
        for attribute in proto.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _copy_metadata(attribute.g, node.attrs[attribute.name])


def _check_wiring(graph: onnx.GraphProto, label: str, outer: Iterable[str] = ()) -> None:
    known = {"", *outer, *(t.name for t in graph.input), *(t.name for t in graph.initializer)}
    known.update(t.values.name for t in graph.sparse_initializer)
    produced = known | {name for node in graph.node for name in node.output}
    for node in graph.node:
        for name in node.input:
            if name not in produced:
                raise BadInputFile(f"{label}: node '{node.name}' ({node.op_type}) reads '{name}', which nothing produces")
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _check_wiring(attribute.g, label, produced)
    for output in graph.output:
        if output.name not in produced:
            raise BadInputFile(f"{label}: nothing produces the graph output '{output.name}'")


def _has_undecodable_text(message: Any) -> bool:
    """Whether any string field below is no UTF-8; protobuf gives those as bytes, or fails when they are read."""
    try:
        for field, value in message.ListFields():
            if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
                continue
            single = isinstance(value, (str, bytes)) or hasattr(value, "ListFields")
            for item in [value] if single else value:
                if isinstance(item, bytes) or (hasattr(item, "ListFields") and _has_undecodable_text(item)):
                    return True
    except UnicodeDecodeError:
        return True
    return False


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _check_external(model: onnx.ModelProto, path: Path) -> None:
    sizes: Dict[str, int] = {}
    for tensor in model.graph.initializer:
        location = external_location(tensor)
        if location is None:
            continue
        if location not in sizes:
            try:
                sizes[location] = (path.parent / location).stat().st_size
            except OSError as error:
                raise BadInputFile(f"{path}: its weights file {path.parent / location} cannot be read "
                                   f"({error.strerror}); keep the two together") from error
        entries = {entry.key: entry.value for entry in tensor.external_data}
        try:
            length = int(entries.get("length", 0)) or int(np.prod(tensor.dims)) * np.dtype(
                onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).itemsize
            end = int(entries.get("offset", 0)) + length
        except (KeyError, ValueError) as error:
            raise BadInputFile(f"{path}: initializer '{tensor.name}' has a damaged offset, length or type "
                               f"({_one_line(error)}); export it again") from error
        if end > sizes[location]:
            raise BadInputFile(f"{path.parent / location}: truncated, '{tensor.name}' ends at byte {end} of "
                               f"{sizes[location]}; export again")


def _bring_weights(source: Path, target: Path) -> None:
    if target.exists():
        if os.path.samefile(source, target) or filecmp.cmp(source, target, shallow=False):
            return
        raise GraphError(f"{target}: another graph's weights lie there already; write to an empty folder")
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
