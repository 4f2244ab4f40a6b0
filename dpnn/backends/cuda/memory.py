"""A device's memory: wires copy between it and pinned memory of the host."""

from collections.abc import Callable
from time import sleep

from dpnn.backends.cuda.device import Device
from dpnn.memory import Array, Group, Test, Wire


class DeviceWire:
    """An array of the device and one of the host, of one shape and one order in memory; rows are copied whole."""

    def __init__(self, device: Device, array: Array, buf: Array) -> None:
        self.array, self.buf = array, buf
        self._device, self._rows = device, (rows_of(array), rows_of(buf))
        self._started: list[Test] = []

    def pull(self, lo: int = 0, hi: int | None = None) -> Test:
        array, buf = self._rows
        return self._start(self._device.pull, array[lo:hi], buf[lo:hi])

    def push(self, lo: int = 0, hi: int | None = None) -> Test:
        array, buf = self._rows
        return self._start(self._device.push, buf[lo:hi], array[lo:hi])

    def wait(self) -> None:
        while self._started:
            if self._started[0]():
                self._started.pop(0)
            else:
                sleep(0)

    def _start(self, copy: Callable[[Array, Array], Test], source: Array, target: Array) -> Test:
        self._started = [test for test in self._started if not test()]
        if not source.size:
            return lambda: True
        self._started.append(copy(source, target))
        return self._started[-1]


class DeviceMemory:
    """The memory of one device."""

    def __init__(self, device: Device) -> None:
        self._device, self.name = device, device.about

    def empty(self, nbytes: int) -> Array:
        return self._device.empty(nbytes)

    def wire(self, array: Array) -> Wire:
        rows = rows_of(array)
        buf = self._device.pinned(rows.nbytes).view(array.dtype).reshape(rows.shape)
        return DeviceWire(self._device, array, buf.transpose(0, 3, 1, 2) if rows.ndim == 4 else buf)

    def lift(self, buf: Array) -> Wire:
        self._device.pin(buf)
        array = self._device.empty(buf.nbytes).view(buf.dtype).reshape(buf.shape)
        self._device.zero(array)
        return DeviceWire(self._device, array, buf)

    def couple(self, array: Array, buf: Array) -> Wire:
        self._device.pin(buf)
        return DeviceWire(self._device, array, buf)

    def mark(self) -> Test:
        return self._device.mark()

    def read(self, array: Array) -> Array:
        found: Array = self._device.read(array)
        return found

    def ident(self) -> bytes:
        return self._device.ident()

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        return self._device.group(ident, size, rank)


def rows_of(array: Array) -> Array:
    """The array as its memory lies, rows first: images are channels-last."""
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
