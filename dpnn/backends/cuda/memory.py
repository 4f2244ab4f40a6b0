"""A device's memory: wires copy between it and pinned memory of the host.

A device may wait for others, with which it sums, and so for other ranks: what waits for it needs a limit. `wait`, which
returns when a test is true, is handed in by who knows that limit.
"""

from collections.abc import Callable
from time import sleep

from dpnn.backends.cuda.device import Device
from dpnn.memory import Array, Group, Test, Wire

Wait = Callable[[Test], object]


def without_limit(test: Test) -> None:
    """For who is alone with the device."""
    while not test():
        sleep(0)


class DeviceWire:
    """An array of the device and one of the host, of one shape and one order in memory; rows are copied whole."""

    def __init__(self, device: Device, array: Array, buf: Array, wait: Wait) -> None:
        self.array, self.buf, self._wait = array, buf, wait
        self._device, self._rows = device, (rows_of(array), rows_of(buf))
        self._started: list[Test] = []

    def pull(self, lo: int = 0, hi: int | None = None) -> Test:
        array, buf = self._rows
        return self._start(self._device.pull, array[lo:hi], buf[lo:hi])

    def push(self, lo: int = 0, hi: int | None = None) -> Test:
        array, buf = self._rows
        return self._start(self._device.push, buf[lo:hi], array[lo:hi])

    def load(self, values: Array) -> None:
        array, buf = (rows[: len(values)] for rows in self._rows)
        values = rows_of(values)
        if values.dtype != array.dtype or not values.flags.c_contiguous:
            self.wait()
            buf[...] = values
            values = buf
        self._start(self._device.push, values, array)

    def wait(self) -> None:
        while self._started:
            self._wait(self._started.pop(0))

    def _start(self, copy: Callable[[Array, Array], Test], source: Array, target: Array) -> Test:
        self._started = [test for test in self._started if not test()]
        if not source.size:
            return lambda: True
        self._started.append(copy(source, target))
        return self._started[-1]


class DeviceMemory:
    """The memory of one device."""

    def __init__(self, device: Device, wait: Wait) -> None:
        self._device, self.name, self._wait = device, device.about, wait

    def empty(self, nbytes: int) -> Array:
        return self._device.empty(nbytes)

    def host(self, nbytes: int) -> Array:
        return self._device.pinned(nbytes)

    def wire(self, array: Array) -> Wire:
        rows = rows_of(array)
        buf = self._device.pinned(rows.nbytes).view(array.dtype).reshape(rows.shape)
        return DeviceWire(self._device, array, buf.transpose(0, 3, 1, 2) if rows.ndim == 4 else buf, self._wait)

    def lift(self, buf: Array) -> Wire:
        self._device.pin(buf)
        array = self._device.empty(buf.nbytes).view(buf.dtype).reshape(buf.shape)
        self._device.zero(array)
        return DeviceWire(self._device, array, buf, self._wait)

    def couple(self, array: Array, buf: Array) -> Wire:
        self._device.pin(buf)
        return DeviceWire(self._device, array, buf, self._wait)

    def free(self) -> int:
        return self._device.free()

    def mark(self) -> Test:
        return self._device.mark()

    def wait(self) -> None:
        self._wait(self._device.mark())

    def zero(self, array: Array) -> None:
        self._device.zero(array)

    def read(self, array: Array) -> Array:
        self.wait()
        found: Array = self._device.read(array)
        return found

    def groups(self) -> bool:
        return self._device.groups()

    def ident(self) -> bytes:
        return self._device.ident()

    def group(self, ident: bytes, size: int, rank: int) -> Group:
        return self._device.group(ident, size, rank)


def rows_of(array: Array) -> Array:
    """The array as its memory lies, rows first: images are channels-last."""
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
