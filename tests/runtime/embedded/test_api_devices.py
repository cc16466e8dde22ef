"""Devices: emulated acquisition, enumeration, offline devices, and what PopART refuses."""
from __future__ import annotations

import pytest
from popart_models import popart

MANAGER = popart.DeviceManager()
Connection = popart.DeviceConnectionType


def refused(message):
    return pytest.raises(popart.popart_exception, match=message)


def test_the_cpu_device_is_one_ipu_and_always_attached():
    device = MANAGER.createCpuDevice()
    with device:
        assert (device.type, device.numIpus, device.numWorkerContexts) == (popart.DeviceType.Cpu, 1, 1)
    assert device.isAttached


def test_option_values_may_be_numbers_or_text():
    assert MANAGER.createIpuModelDevice({"numIPUs": "4"}) == MANAGER.createIpuModelDevice({"numIPUs": 4})
    assert MANAGER.createIpuModelDevice({}).tilesPerIPU == 4
    with refused("numIPUs and tilesPerIPU must be integers"):
        MANAGER.createIpuModelDevice({"numIPUs": "many"})


def test_enumerated_devices_can_be_acquired_by_their_id():
    pairs = MANAGER.enumerateDevices(numIpus=2)
    assert [device.driverIds for device in pairs[:2]] == [[0, 1], [2, 3]] and len(pairs) == 8
    assert not any(device.isAttached for device in pairs)
    taken = MANAGER.acquireDeviceById(pairs[1].id)
    assert (taken.numIpus, taken.driverIds, taken.id, taken.isAttached) == (2, [2, 3], pairs[1].id, True)
    assert [device.id for device in MANAGER.enumerateDevices()] == list(range(16))


def test_an_id_that_does_not_exist_is_none_or_raises():
    assert MANAGER.tryAcquireDeviceById(999) is None
    with refused("Failed to acquire device with ID 999"):
        MANAGER.acquireDeviceById(999)


def test_more_tiles_than_an_ipu_has_are_not_found():
    assert MANAGER.tryAcquireAvailableDevice(1, tilesPerIpu=5000) is None
    with refused("Failed to acquire device with 1 IPUs, 5000 tiles. Ensure that there are sufficient IPUs available"):
        MANAGER.acquireAvailableDevice(1, tilesPerIpu=5000)
    assert MANAGER.acquireAvailableDevice(1, tilesPerIpu=1216).tilesPerIPU == 1216


def test_other_kinds_enumerate_as_they_are():
    assert [d.type for d in MANAGER.enumerateDevices(deviceType=popart.DeviceType.Cpu)] == [popart.DeviceType.Cpu]
    assert MANAGER.enumerateDevices(numIpus=3) == [] == MANAGER.enumerateDevices(deviceType=popart.DeviceType.IpuModel)


def test_on_demand_devices_attach_when_asked():
    device = MANAGER.acquireAvailableDevice(2, connectionType=Connection.OnDemand)
    assert not device.isAttached and device.attach() and device.isAttached
    device.detach()
    assert not device.isAttached and device.tryAttachUntilTimeout()
    with device as same:
        assert same is device
    assert not device.isAttached


def test_offline_devices_have_the_tiles_of_their_version():
    device = MANAGER.createOfflineIPUDevice({"numIPUs": 2, "ipuVersion": "ipu1", "tilesPerIPU": 10})
    assert (device.tilesPerIPU, device.ipuVersion, device.connectionType) == (1216, "ipu1", Connection.Never)
    with refused("Unknown syncPattern 'sometimes'"):
        MANAGER.createOfflineIPUDevice({"syncPattern": "sometimes"})
    with refused("Invalid option `compileIPUCode' passed to .* for device type OfflineIpu"):
        MANAGER.createOfflineIPUDevice({"compileIPUCode": True})


def test_offline_device_from_another_one_or_from_a_system():
    like = MANAGER.createOfflineIpuFromDeviceInfo(MANAGER.acquireAvailableDevice(4))
    assert (like.type, like.numIpus, like.isAttached) == (popart.DeviceType.OfflineIpu, 4, False)
    named = MANAGER.createOfflineIpuFromSystemString("POD16", 8)
    assert (named.numIpus, named.ipuVersion, named.attach()) == (8, "ipu2", False)
    with refused("Unknown system 'POD17'"):
        MANAGER.createOfflineIpuFromSystemString("POD17", 1)
    with refused("has 4 IPUs; 8 were asked for"):
        MANAGER.createOfflineIpuFromSystemString("M2000", 8)
    with refused("needs an IPU device"):
        MANAGER.createOfflineIpuFromDeviceInfo(MANAGER.createCpuDevice())


@pytest.mark.parametrize("acquire", ["acquireDeviceById", "tryAcquireDeviceById"])
def test_hardware_is_never_acquired_without_a_connection(acquire):
    with refused("when connectionType is DeviceConnectionType::Never"):
        getattr(MANAGER, acquire)(0, connectionType=Connection.Never)


def test_devices_are_read_only_and_hashable():
    device = MANAGER.acquireAvailableDevice(2)
    with pytest.raises(AttributeError):
        device.numIpus = 4
    assert len({device, MANAGER.acquireAvailableDevice(2), MANAGER.acquireAvailableDevice(4)}) == 2


@pytest.mark.parametrize("call", [
    lambda: MANAGER.acquireAvailableDevice(1, pattern="Full"), lambda: MANAGER.acquireAvailableDevice(1, 0, 0),
    lambda: MANAGER.createIpuModelDevice(None), lambda: MANAGER.setOnDemandAttachTimeout("soon"),
    lambda: MANAGER.enumerateDevices(connectionType=1),
])  # fmt: skip
def test_arguments_of_the_wrong_type_are_type_errors(call):
    with pytest.raises(TypeError):
        call()
