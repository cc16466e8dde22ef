"""The attributes of nodes that are already in the model. A node is named by the exact set of all its outputs."""
from ..errors import popart_exception


class NodeAttributes:
    """The part of Builder that reads and writes node attributes; `_model` is the Builder's Model.

    nodeOutputNames is a set (or list) of tensor ids, or one id. A node that cannot be found raises popart_exception.
    """

    def _attribute(self, name, outputs):
        return next((a for a in self._model.node_with(outputs).attribute if a.name == name), None)

    def _set(self, name, value, outputs):
        """Adds the attribute or replaces its value."""
        from . import attributes

        node, known = self._model.node_with(outputs), self._attribute(name, outputs)
        (known or node.attribute.add()).CopyFrom(attributes.from_python(name, value))

    def addNodeAttribute(self, attributeName, attributeValue, nodeOutputNames):
        """attributeValue: int, float, str or a list of one of them."""
        if self._attribute(attributeName, nodeOutputNames) is not None:
            raise popart_exception(f"Node already has attribute {attributeName}.")
        self._set(attributeName, attributeValue, nodeOutputNames)

    def nodeHasAttribute(self, attributeName, nodeOutputNames):
        return self._attribute(attributeName, nodeOutputNames) is not None

    def _value(self, name, outputs, kind):
        from onnx import AttributeProto

        from . import attributes

        proto = self._attribute(name, outputs)
        if proto is None:
            raise popart_exception(f"Node does not have an attribute {name}.")
        if proto.type != AttributeProto.AttributeType.Value(kind):
            found = AttributeProto.AttributeType.Name(proto.type)
            raise popart_exception(f"Node does not have a {kind} attribute {name}: it is {found}.")
        return attributes.decode(proto)

    def getInt64NodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, "INT")

    def getInt64VectorNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, "INTS")

    def getFloatNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, "FLOAT")

    def getFloatVectorNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, "FLOATS")

    def getStringNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, "STRING")

    def getStringVectorNodeAttribute(self, attributeName, nodeOutputNames):
        return self._value(attributeName, nodeOutputNames, "STRINGS")

    def removeNodeAttribute(self, attributeName, nodeOutputNames):
        proto = self._attribute(attributeName, nodeOutputNames)
        if proto is None:
            raise popart_exception(f"Cannot remove attribute {attributeName} as it does not exist.")
        self._model.node_with(nodeOutputNames).attribute.remove(proto)

    def getAllNodeAttributeNames(self, nodeOutputNames):
        return [proto.name for proto in self._model.node_with(nodeOutputNames).attribute]
