"""InputShapeInfo and InputSettings: what a program says about the inputs of a model."""
from .enums import ExchangeStrategy, ReplicatedStreamMode, TileSet
from .errors import popart_exception
from .tensorinfo import TensorInfo


class InputShapeInfo:
    """Shapes and types of model inputs that the ONNX file leaves open."""

    def __init__(self):
        self._infos = {}

    def add(self, tensorId, info):
        """A second call for one id keeps the first TensorInfo, as std::map::insert does."""
        if not isinstance(tensorId, str):
            raise TypeError(f"InputShapeInfo.add takes a tensor id, not {tensorId!r}")
        if not isinstance(info, TensorInfo):
            raise TypeError("InputShapeInfo.add takes a TensorInfo")
        self._infos.setdefault(tensorId, info)

    def get(self, tensorId):
        if tensorId not in self._infos:
            raise popart_exception(f"No input tensor info provided for '{tensorId}' in InputShapeInfo")
        return self._infos[tensorId]

    def has(self, tensorId):
        return tensorId in self._infos


class InputSettings:
    """`InputSettings(tileSet, exchangeStrategy)` or `InputSettings(ReplicatedStreamMode.Broadcast)`.

    The keyword of the second form is `relicatedStreamMode`, spelled as PopART spells it.
    """

    def __init__(
        self,
        tileSet=TileSet.Compute,
        exchangeStrategy=ExchangeStrategy.JustInTime,
        relicatedStreamMode=ReplicatedStreamMode.Replicate,
    ):
        if isinstance(tileSet, ReplicatedStreamMode):
            tileSet, relicatedStreamMode = TileSet.Compute, tileSet
        self._tile_set = tileSet
        self._exchange = exchangeStrategy
        self._stream_mode = relicatedStreamMode
        for value, kind in (
            (tileSet, TileSet), (exchangeStrategy, ExchangeStrategy), (relicatedStreamMode, ReplicatedStreamMode)
        ):  # fmt: skip
            if not isinstance(value, kind):
                raise TypeError(f"InputSettings(): {value!r} is not a {kind.__name__}")

    def tileSet(self):
        return self._tile_set

    def exchangeStrategy(self):
        return self._exchange

    def replicatedStreamMode(self):
        return self._stream_mode

    def setTileSet(self, tileSet):
        self._tile_set = tileSet

    def setExchangeStrategy(self, exchangeStrategy):
        self._exchange = exchangeStrategy

    def setReplicatedStreamMode(self, streamMode):
        self._stream_mode = streamMode
