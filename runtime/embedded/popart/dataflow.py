"""DataFlow and AnchorReturnType: which tensors come back to the host, and how often."""
from .enums import AnchorReturnTypeId, ExchangeStrategy, TileSet
from .errors import popart_exception

_IDS = {member.name.upper(): member for member in AnchorReturnTypeId}


class AnchorReturnType:
    """`AnchorReturnType("All" | "Final" | "Sum")` or `AnchorReturnType("EveryN", period)`; any case."""

    def __init__(
        self,
        anchorReturnTypeString,
        returnPeriod=None,
        tileSet=TileSet.Compute,
        exchangeStrategy=ExchangeStrategy.JustInTime,
    ):
        if isinstance(returnPeriod, TileSet):  # PopART's other overload: (string, tileSet, exchangeStrategy)
            returnPeriod, tileSet, exchangeStrategy = (
                None, returnPeriod, tileSet if isinstance(tileSet, ExchangeStrategy) else exchangeStrategy,
            )  # fmt: skip
        if not isinstance(anchorReturnTypeString, str):
            raise TypeError("AnchorReturnType: anchorReturnTypeString must be a str")
        self._id = _IDS.get(anchorReturnTypeString.upper())
        if self._id is None:
            raise popart_exception(f"Invalid anchor return type ID supplied: {anchorReturnTypeString}")
        if self._id is AnchorReturnTypeId.EveryN:
            if returnPeriod is None:
                raise popart_exception("Must specify return period with option 'EVERYN'")
            if returnPeriod <= 0:
                raise popart_exception("Anchor return period must be greater than zero")
        elif returnPeriod is not None:
            raise popart_exception("A return period should not be supplied for this anchor return type")
        self._period, self._tile_set, self._exchange = returnPeriod or 1, tileSet, exchangeStrategy

    def id(self):
        return self._id

    def rp(self):
        return self._period

    def tileSet(self):
        return self._tile_set

    def exchangeStrategy(self):
        return self._exchange

    def __repr__(self):
        period = f", {self._period}" if self._id is AnchorReturnTypeId.EveryN else ""
        return f'AnchorReturnType("{self._id.name}"{period})'


class DataFlow:
    """`DataFlow(bps, {id: AnchorReturnType})` or `DataFlow(bps, [ids], AnchorReturnType("All"))`."""

    def __init__(self, batchesPerStep, anchorTensors=None, anchorReturnType=None, *, anchorIds=None):
        anchors = anchorIds if anchorTensors is None else anchorTensors
        if anchors is None:
            anchors = {}
        if isinstance(anchors, dict):
            if anchorReturnType is not None:
                raise TypeError("DataFlow: anchorReturnType goes with a list of ids, not with a dict")
            self._anchors = dict(anchors)
        elif isinstance(anchors, (str, bytes)):
            raise TypeError("DataFlow: anchorIds must be a list of tensor ids")
        else:
            self._anchors = dict.fromkeys(anchors, anchorReturnType or AnchorReturnType("All"))
        for name, art in self._anchors.items():
            if not isinstance(name, str) or not isinstance(art, AnchorReturnType):
                raise TypeError(f"DataFlow: anchors map tensor ids to AnchorReturnType, not {name!r} to {art!r}")
        self.setBatchesPerStep(batchesPerStep)

    def setBatchesPerStep(self, batchesPerStep):
        if isinstance(batchesPerStep, bool) or not hasattr(batchesPerStep, "__index__"):
            raise TypeError("DataFlow: batchesPerStep must be an int")
        if batchesPerStep <= 0:
            raise popart_exception("'Batches per step' must be greater than zero")
        for art in self._anchors.values():
            if art.id() is AnchorReturnTypeId.EveryN and art.rp() > batchesPerStep:
                raise popart_exception("Return period must be <= to the number of batches per step")
            if art.id() is AnchorReturnTypeId.EveryN and batchesPerStep % art.rp():
                raise popart_exception("Return period must be a factor of the number of batches per step")
        self._batches_per_step = int(batchesPerStep)

    def isAnchored(self, tensorId):
        return tensorId in self._anchors

    def nAnchors(self):
        return len(self._anchors)

    def batchesPerStep(self):
        return self._batches_per_step

    def anchors(self):
        return list(self._anchors)

    def art(self, tensorId):
        if tensorId not in self._anchors:
            raise popart_exception(f"There is no anchor '{tensorId}' in this DataFlow")
        return self._anchors[tensorId]
