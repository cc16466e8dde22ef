"""GraphTransformer: rewrites of an ONNX model before a session sees it. The work is in `_engine/transform.py`."""


class GraphTransformer:
    """`GraphTransformer(model bytes or file name)`; every method changes the model, getModelProto gives its bytes."""

    def __init__(self, modelProtoOrFilename):
        from ._engine.model_io import load_model

        self._model = load_model(modelProtoOrFilename)

    def getModelProto(self):
        return self._model.SerializeToString()

    def convertFloatsToHalfs(self):
        """FLOAT to FLOAT16 everywhere but where the ONNX specification asks for FLOAT, like the scales of a Resize."""
        self._convert("FLOAT", "FLOAT16")

    def convertUINT8ToINT32(self):
        self._convert("UINT8", "INT32")

    def convertUINT16ToINT32(self):
        self._convert("UINT16", "INT32")

    def convertINT8ToINT32(self):
        self._convert("INT8", "INT32")

    def convertINT16ToINT32(self):
        self._convert("INT16", "INT32")

    def convertINT64ToINT32(self, clip=False):
        """INT64 to INT32 but where the specification asks for INT64, like the shape of a Reshape.

        A value that INT32 does not have raises popart_exception, or is clipped when `clip` is true.
        """
        self._convert("INT64", "INT32", clip)

    def convertDoublesToFloats(self):
        self._convert("DOUBLE", "FLOAT")

    def convertDoublesToHalfs(self):
        self._convert("DOUBLE", "FLOAT16")

    def convertBFloats16ToFloat32(self):
        self._convert("BFLOAT16", "FLOAT")

    def convertInitializersToConstants(self, ids):
        """These initializers become Constant nodes, so that training leaves them alone."""
        from ._engine import transform

        transform.initializers_to_constants(self._model, list(ids))

    def convertAllFixedPointInitializersToConstants(self):
        """Every integer or boolean initializer becomes a Constant node."""
        from ._engine import transform

        transform.initializers_to_constants(self._model, transform.fixed_point_initializers(self._model))

    def prepareNodesForTraining(self):
        """A BatchNormalization with one output gets all five, which is what makes it use the batch's statistics."""
        from ._engine import transform

        transform.prepare_nodes_for_training(self._model)

    def removeUnusedInputs(self):
        """Inputs and initializers that no node reads and no output names are removed."""
        from ._engine import transform

        transform.remove_unused_inputs(self._model)

    def saveInitializersExternally(self, ids, filename):
        """The data of these initializers moves into a file that the model names."""
        from ._builder.saving import move_initializers

        move_initializers(self._model, list(ids), filename)

    def _convert(self, source, target, clip=False):
        from ._engine import element_types

        element_types.convert(self._model, source, target, clip)
