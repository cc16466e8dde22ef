"""DeviceManager and DeviceInfo.

There is no IPU here. A device of type Ipu is emulated: it has the IPU count that was asked for, so that placement is
checked as on hardware, while the arithmetic runs in torch on this machine. `DeviceInfo.isEmulated` says so.
"""
from .enums import DeviceConnectionType, DeviceSelectionCriterion, DeviceType, SyncPattern
from .errors import popart_exception, unsupported

_TILES = 1472  # GC200 and Bow
_MODEL_DEFAULTS = {"numIPUs": "1", "tilesPerIPU": "4", "compileIPUCode": "1", "ipuVersion": "ipu2"}
_OFFLINE_DEFAULTS = {
    "numIPUs": "1", "tilesPerIPU": str(_TILES), "ipuVersion": "ipu2", "syncPattern": "full", "gatewayMode": "false",
}  # fmt: skip


class DeviceInfo:
    """A device that a session can be built for. Also a context manager that detaches at its end."""

    def __init__(self, type, numIpus, tilesPerIPU, version="", connectionType=DeviceConnectionType.Always, id=0):
        self.type, self.numIpus, self.tilesPerIPU, self.version = type, numIpus, tilesPerIPU, version
        self.ipuVersion, self.connectionType, self.id = version, connectionType, id
        self.driverIds = list(range(numIpus)) if type is DeviceType.Ipu else []
        self.numWorkerContexts = 6 if type is not DeviceType.Cpu else 1
        self.isAttached = type in (DeviceType.Cpu, DeviceType.IpuModel)
        self.isEmulated = True

    @property
    def tilesPerIpu(self):
        return self.tilesPerIPU

    def attach(self):
        if self.connectionType is DeviceConnectionType.Never:
            return False
        self.isAttached = True
        return True

    def tryAttachUntilTimeout(self):
        return self.attach()

    def detach(self):
        self.isAttached = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.detach()

    def __repr__(self):
        return f"DeviceInfo({self.type.name}, numIpus={self.numIpus}, tilesPerIPU={self.tilesPerIPU}, emulated)"


class DeviceManager:
    """PopART's device manager. `acquireAvailableDevice(n)` gives an emulated device for every power of two."""

    def createCpuDevice(self):
        return DeviceInfo(DeviceType.Cpu, 1, 1)

    def createIpuModelDevice(self, opts):
        values = _options(opts, _MODEL_DEFAULTS, "IpuModel")
        return DeviceInfo(DeviceType.IpuModel, *_sizes(values), values["ipuVersion"])

    def createSimDevice(self, opts):
        raise unsupported("the Poplar simulator (createSimDevice)", "Use createIpuModelDevice or createCpuDevice.")

    def createOfflineIPUDevice(self, opts=None):
        values = _options(opts or {}, _OFFLINE_DEFAULTS, "OfflineIpu")
        if values["ipuVersion"] not in ("ipu1", "ipu2", "ipu21"):
            raise popart_exception(f"Unknown ipuVersion '{values['ipuVersion']}'; it is ipu1, ipu2 or ipu21")
        never = DeviceConnectionType.Never
        return DeviceInfo(DeviceType.OfflineIpu, *_sizes(values), values["ipuVersion"], never)

    def createOfflineIpuFromDeviceInfo(self, deviceInfo):
        return self.createOfflineIPUDevice({"numIPUs": deviceInfo.numIpus, "ipuVersion": deviceInfo.version or "ipu2"})

    def createOfflineIpuFromSystemString(self, system, numIpus):
        raise unsupported("createOfflineIpuFromSystemString", "Use createOfflineIPUDevice.")

    def acquireAvailableDevice(
        self,
        numIpus=1,
        tilesPerIpu=0,
        pattern=SyncPattern.Full,
        connectionType=DeviceConnectionType.Always,
        selectionCriterion=DeviceSelectionCriterion.First,
    ):
        if connectionType is DeviceConnectionType.Never:
            raise popart_exception(
                "Trying to acquire a hardware device when connectionType is DeviceConnectionType::Never"
            )
        if numIpus < 1 or numIpus & (numIpus - 1):
            raise popart_exception(
                f"You have attempted to acquire {numIpus} IPUs. The number of IPUs requested must be a power of two"
            )
        device = DeviceInfo(DeviceType.Ipu, int(numIpus), tilesPerIpu or _TILES, "ipu2", connectionType)
        if connectionType is DeviceConnectionType.Always:
            device.attach()
        return device

    # An emulated device is never taken by someone else, so "try" differs only in name.
    tryAcquireAvailableDevice = acquireAvailableDevice

    def acquireDeviceById(self, id, pattern=SyncPattern.Full, connectionType=DeviceConnectionType.Always):
        raise popart_exception(f"Failed to acquire device with ID {id}: there is no IPU hardware behind this PopART")

    def tryAcquireDeviceById(self, id, pattern=SyncPattern.Full, connectionType=DeviceConnectionType.Always):
        return None

    def enumerateDevices(
        self,
        pattern=SyncPattern.Full,
        numIpus=1,
        deviceType=DeviceType.Ipu,
        connectionType=DeviceConnectionType.Always,
        tilesPerIPU=0,
    ):
        """The devices that exist: the CPU. Emulated IPUs are made on demand and are not listed."""
        return [self.createCpuDevice()] if deviceType is DeviceType.Cpu else []

    def setOnDemandAttachTimeout(self, attachTimeout):
        """Attaching to an emulated device never waits."""


def _options(given, defaults, kind):
    values = dict(defaults)
    for key, value in given.items():
        if key not in defaults:
            raise popart_exception(
                f"Invalid option `{key}' passed to DevicexManager::createHostDevice for device type {kind}"
            )
        values[key] = str(value)
    return values


def _sizes(values):
    try:
        ipus, tiles = int(values["numIPUs"]), int(values["tilesPerIPU"])
    except ValueError:
        raise popart_exception(f"numIPUs and tilesPerIPU must be integers, not {values}") from None
    if ipus < 1 or tiles < 1:
        raise popart_exception(f"numIPUs and tilesPerIPU must be at least 1, not {ipus} and {tiles}")
    return ipus, tiles
