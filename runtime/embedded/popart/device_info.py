"""DeviceInfo: the device that a session is built for."""
from .enums import DeviceConnectionType, DeviceType

_HARDWARE = (DeviceType.Ipu,)
_CPU_VERSION, _MODEL_VERSION = "<unknown-cpu>", "ipu2"


class DeviceInfo:
    """A device of the manager. Also a context manager that detaches at its end.

    `isAttached` of the CPU and of the IPU Model is always true; an emulated IPU is attached by acquire with
    DeviceConnectionType.Always, else by attach(). An offline device can never be.
    """

    def __init__(
        self, type, numIpus, tilesPerIPU, version="", connectionType=DeviceConnectionType.Always, id=0, driverIds=None
    ):
        self._facts = {
            "type": type, "numIpus": numIpus, "tilesPerIPU": tilesPerIPU, "connectionType": connectionType, "id": id,
            "ipuVersion": version,
        }  # fmt: skip
        self._drivers = list(range(numIpus)) if driverIds is None and type in _HARDWARE else list(driverIds or ())
        self._attached = type not in (DeviceType.Ipu, DeviceType.OfflineIpu)
        self.isEmulated = True

    type = property(lambda self: self._facts["type"])
    numIpus = property(lambda self: self._facts["numIpus"])
    tilesPerIPU = property(lambda self: self._facts["tilesPerIPU"])
    tilesPerIpu = property(lambda self: self._facts["tilesPerIPU"])
    connectionType = property(lambda self: self._facts["connectionType"])
    id = property(lambda self: self._facts["id"])
    isAttached = property(lambda self: self._attached)
    driverIds = property(lambda self: list(self._drivers))

    @property
    def ipuVersion(self):
        """`ipu1`, `ipu2`, `ipu21`; "" for a CPU."""
        return self._facts["ipuVersion"]

    @property
    def version(self):
        """What Poplar calls the device: the emulated ones say so."""
        return _CPU_VERSION if self.type is DeviceType.Cpu else (self.ipuVersion or _MODEL_VERSION)

    @property
    def numWorkerContexts(self):
        return 1 if self.type is DeviceType.Cpu else 6

    def attach(self):
        """True when the device is attached now, False when it cannot be."""
        if self.connectionType is DeviceConnectionType.Never:
            return False
        self._attached = True
        return True

    def tryAttachUntilTimeout(self):
        return self.attach()

    def detach(self):
        if self.type in _HARDWARE:
            self._attached = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.detach()

    def __eq__(self, other):
        if not isinstance(other, DeviceInfo):
            return NotImplemented
        return self._facts == other._facts

    def __hash__(self):
        return hash(tuple(map(str, self._facts.values())))

    def __repr__(self):
        return (
            f"DeviceInfo({self.type.name}, numIpus={self.numIpus}, tilesPerIPU={self.tilesPerIPU}, id={self.id}, "
            f"ipuVersion={self.ipuVersion or 'none'}, {self.connectionType.name}, emulated)"
        )
