"""DeviceManager and DeviceInfo.

There is no IPU here. A device of type Ipu is emulated: it has the IPU count that was asked for, so that placement is
checked as on hardware, while the arithmetic runs in torch on this machine. `DeviceInfo.isEmulated` says so.
"""
from .device_info import DeviceInfo
from .enums import DeviceConnectionType, DeviceSelectionCriterion, DeviceType, SyncPattern
from .errors import popart_exception

IPUS = 16  # what enumerateDevices lists: an emulated Pod16
TILES = {"ipu1": 1216, "ipu2": 1472, "ipu21": 1472}
_FEW_TILES = "4"  # PopART's defaultFewTiles of the IPU Model
_MODEL_DEFAULTS = {"numIPUs": "1", "tilesPerIPU": _FEW_TILES, "compileIPUCode": "1", "ipuVersion": "ipu2"}
_SIM_DEFAULTS = {"numIPUs": "1", "tilesPerIPU": _FEW_TILES}
_OFFLINE_DEFAULTS = {
    "numIPUs": "1", "tilesPerIPU": "", "ipuVersion": "ipu2", "syncPattern": "full", "gatewayMode": "false",
}  # fmt: skip
_SYSTEMS = {  # system string -> (IPU version, IPUs that it has)
    **{f"{head}{n}": ("ipu2", n) for head in ("POD", "POD_", "BOW-POD", "BOW_POD", "M2000-POD") for n in (4, 16, 32, 64, 128)},
    "M2000": ("ipu2", 4), "BOW-2000": ("ipu2", 4), "BOW_2000": ("ipu2", 4), "C600": ("ipu21", 8), "C2": ("ipu1", 2),
}  # fmt: skip


class DeviceManager:
    """PopART's device manager. `acquireAvailableDevice(n)` gives an emulated device for every power of two."""

    def createCpuDevice(self):
        return DeviceInfo(DeviceType.Cpu, 1, 1)

    def createIpuModelDevice(self, opts):
        values = _options(opts, _MODEL_DEFAULTS, "IpuModel")
        _check_version(values["ipuVersion"])
        return DeviceInfo(DeviceType.IpuModel, *_sizes(values), values["ipuVersion"])

    def createSimDevice(self, opts):
        """Like the IPU Model, the simulator is emulated: its placement rules, this machine's arithmetic."""
        return DeviceInfo(DeviceType.Sim, *_sizes(_options(opts, _SIM_DEFAULTS, "Sim")))

    def createOfflineIPUDevice(self, opts):
        values = _options(opts, _OFFLINE_DEFAULTS, "OfflineIpu")
        version = values["ipuVersion"]
        _check_version(version)
        _check_choice("syncPattern", values["syncPattern"], ("full", "singlePipeline", "replicaAndLadder"))
        _check_choice("gatewayMode", values["gatewayMode"].lower(), ("true", "false", "1", "0"))
        ipus, _ = _sizes({**values, "tilesPerIPU": "1"})  # PopART reads tilesPerIPU and uses the version's
        return DeviceInfo(DeviceType.OfflineIpu, ipus, TILES[version], version, DeviceConnectionType.Never)

    def createOfflineIpuFromDeviceInfo(self, deviceInfo):
        """A device to compile for, like this one."""
        if not isinstance(deviceInfo, DeviceInfo):
            raise TypeError("createOfflineIpuFromDeviceInfo takes a DeviceInfo")
        if deviceInfo.type not in (DeviceType.Ipu, DeviceType.OfflineIpu):
            raise popart_exception(f"An offline IPU needs an IPU device, not one of type {deviceInfo.type.name}")
        version = deviceInfo.ipuVersion
        return DeviceInfo(
            DeviceType.OfflineIpu, deviceInfo.numIpus, deviceInfo.tilesPerIPU, version, DeviceConnectionType.Never
        )

    def createOfflineIpuFromSystemString(self, system, numIpus):
        """`numIpus` IPUs of a system that is named, like "POD16" or "C600"."""
        if str(system).upper() not in _SYSTEMS:
            raise popart_exception(f"Unknown system '{system}'; the known ones are {', '.join(_SYSTEMS)}")
        version, limit = _SYSTEMS[str(system).upper()]
        if not 1 <= numIpus <= limit:
            raise popart_exception(f"The system '{system}' has {limit} IPUs; {numIpus} were asked for")
        return DeviceInfo(DeviceType.OfflineIpu, int(numIpus), TILES[version], version, DeviceConnectionType.Never)

    def acquireAvailableDevice(
        self,
        numIpus=1,
        tilesPerIpu=0,
        pattern=SyncPattern.Full,
        connectionType=DeviceConnectionType.Always,
        selectionCriterion=DeviceSelectionCriterion.First,
    ):
        found = self.tryAcquireAvailableDevice(numIpus, tilesPerIpu, pattern, connectionType, selectionCriterion)
        if found is None:
            size = f", {tilesPerIpu} tiles" if tilesPerIpu else ""
            raise popart_exception(
                f"Failed to acquire device with {numIpus} IPUs{size}. Ensure that there are sufficient IPUs available. "
                f"If you have enabled the Graphcore IPU-on-Demand feature, check your connection settings."
            )
        return found

    def tryAcquireAvailableDevice(
        self,
        numIpus=1,
        tilesPerIpu=0,
        pattern=SyncPattern.Full,
        connectionType=DeviceConnectionType.Always,
        selectionCriterion=DeviceSelectionCriterion.First,
    ):
        """None when this emulation has no such device: one with another number of tiles than an IPU has."""
        _check_types(pattern, connectionType)
        if not isinstance(selectionCriterion, DeviceSelectionCriterion):
            raise TypeError(f"{selectionCriterion!r} is not a DeviceSelectionCriterion")
        if connectionType is DeviceConnectionType.Never:
            raise popart_exception(
                "Trying to acquire a hardware device when connectionType is DeviceConnectionType::Never"
            )
        if numIpus < 1 or numIpus & (numIpus - 1):
            raise popart_exception(
                f"You have attempted to acquire {numIpus} IPUs. The number of IPUs requested must be a power of two"
            )
        if not 0 <= tilesPerIpu <= TILES["ipu2"]:
            return None
        first = next((first for first, size in _first_ids() if size == numIpus), 0)
        return _emulated(numIpus, first, connectionType, tilesPerIpu)

    def acquireDeviceById(self, id, pattern=SyncPattern.Full, connectionType=DeviceConnectionType.Always):
        found = self.tryAcquireDeviceById(id, pattern, connectionType)
        if found is None:
            raise popart_exception(f"Failed to acquire device with ID {id}. Ensure that the ID is valid.")
        return found

    def tryAcquireDeviceById(self, id, pattern=SyncPattern.Full, connectionType=DeviceConnectionType.Always):
        """The emulated device that enumerateDevices shows under this id: 0..15 are single IPUs, then pairs, ..."""
        _check_types(pattern, connectionType)
        if connectionType is DeviceConnectionType.Never:
            raise popart_exception(
                "Trying to acquire a hardware device when connectionType is DeviceConnectionType::Never"
            )
        size = next((size for first, size in _first_ids() if first <= id < first + IPUS // size), None)
        return None if size is None else _emulated(size, int(id), connectionType)

    def enumerateDevices(
        self,
        pattern=SyncPattern.Full,
        numIpus=1,
        deviceType=DeviceType.Ipu,
        connectionType=DeviceConnectionType.Always,
        tilesPerIPU=0,
    ):
        """Emulated devices of this size, detached; for DeviceType.Cpu the CPU."""
        _check_types(pattern, connectionType)
        if deviceType is DeviceType.Cpu:
            return [self.createCpuDevice()]
        if deviceType is not DeviceType.Ipu or not 0 <= tilesPerIPU <= TILES["ipu2"]:
            return []
        first = next((first for first, size in _first_ids() if size == numIpus), None)
        if first is None:
            return []
        return [
            _emulated(numIpus, first + index, connectionType, tilesPerIPU, attach=False)
            for index in range(IPUS // numIpus)
        ]

    def setOnDemandAttachTimeout(self, attachTimeout):
        """Attaching to an emulated device never waits, so any number of seconds will do."""
        if isinstance(attachTimeout, bool) or not hasattr(attachTimeout, "__index__") or attachTimeout < 0:
            raise TypeError(f"setOnDemandAttachTimeout takes a number of seconds, not {attachTimeout!r}")


def _first_ids():
    """(first id, IPUs) of the single IPUs, of the pairs, of the groups of four, ..."""
    first, size = 0, 1
    while size <= IPUS:
        yield first, size
        first, size = first + IPUS // size, size * 2


def _emulated(ipus, id, connection, tiles=0, attach=True):
    start = next(((id - first) * size for first, size in _first_ids() if size == ipus), 0)
    drivers = range(max(start, 0), max(start, 0) + ipus)
    device = DeviceInfo(DeviceType.Ipu, int(ipus), tiles or TILES["ipu2"], "ipu2", connection, id, drivers)
    if attach and connection is DeviceConnectionType.Always:
        device.attach()
    return device


def _check_types(pattern, connection):
    if not isinstance(pattern, SyncPattern):
        raise TypeError(f"{pattern!r} is not a SyncPattern")
    if not isinstance(connection, DeviceConnectionType):
        raise TypeError(f"{connection!r} is not a DeviceConnectionType")


def _check_version(version):
    if version not in TILES:
        raise popart_exception(f"Unknown ipuVersion '{version}'. Supported options are: {', '.join(TILES)}")


def _check_choice(key, value, allowed):
    if value not in allowed:
        raise popart_exception(f"Unknown {key} '{value}'. Supported options are: {', '.join(allowed)}")


def _options(given, defaults, kind):
    if not isinstance(given, dict):
        raise TypeError(f"A dict of device options is expected, not {given!r}")
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
