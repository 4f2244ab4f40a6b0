"""frozen.py FOLDER BEHIND FLAG LINE...: runs a command line that sees BEHIND's files in FOLDER, by a file system of its
own (FUSE) that answers nobody while the file FLAG is there: what a hard mount of NFS does when its server is gone.

Who waits for an answer can be killed, as with NFS. Needs root, and a mount namespace of its own.
"""

import ctypes
import errno
import os
import select
import signal
import struct
import sys
import time
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
REQUEST = struct.Struct("<IIQQIIIHH")
"""Length, kind, number, node, and who asks."""
ATTRIBUTES = struct.Struct("<6Q10I")
LARGEST = 1 << 20
NOT_CACHED = 1


def main(folder: str, behind: str, flag: str, *line: str) -> None:
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    if LIBC.mount(b"frozen", folder.encode(), b"fuse", 0, options):
        sys.exit(f"{folder} can't be mounted: {os.strerror(ctypes.get_errno())}")
    job = os.getpid()
    if os.fork() == 0:
        LIBC.prctl(1, signal.SIGKILL)  # ends with the job
        if os.getppid() == job:
            Folder(device, behind).serve(Path(flag))
    os.execvp(line[0], line)


class Folder:
    """Answers the kernel's requests (linux/fuse.h) from the files of another folder."""

    def __init__(self, device: int, behind: str) -> None:
        self._device = device
        self._paths = {1: behind}
        """By the number that the kernel knows a file by."""
        self._last = 1

    def serve(self, flag: Path) -> None:
        while True:
            select.select([self._device], [], [])
            if flag.exists():  # what nobody has read yet can still be given up by who asks
                time.sleep(0.01)
                continue
            request = os.read(self._device, LARGEST + 4096)
            _, kind, number, node, *_ = REQUEST.unpack_from(request)
            error, answer = 0, b""
            try:
                found = KINDS[kind](self, node, request[REQUEST.size :])
                if found is None:
                    continue
                answer = found
            except KeyError:
                error = errno.ENOSYS
            except OSError as failure:
                error = failure.errno or errno.EIO
            os.write(self._device, struct.pack("<IiQ", 16 + len(answer), -error, number) + answer)

    def init(self, node: int, body: bytes) -> bytes:
        _, _, ahead, _ = struct.unpack_from("<4I", body)
        big_writes = 1 << 5
        return struct.pack("<4IHHII2H8I", 7, 31, ahead, big_writes, 0, 0, LARGEST, 1, 256, 0, *[0] * 8)

    def lookup(self, node: int, body: bytes) -> bytes:
        return self._entry(self._named(node, body))

    def forget(self, node: int, body: bytes) -> None:
        return None

    def getattr(self, node: int, body: bytes) -> bytes:
        return struct.pack("<QII", 0, 0, 0) + self._attributes(node)

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size = struct.unpack_from("<IIQQ", body)
        if valid & 8:
            os.truncate(self._paths[node], size)
        return self.getattr(node, body)

    def mkdir(self, node: int, body: bytes) -> bytes:
        path = self._named(node, body[8:])
        os.mkdir(path)
        return self._entry(path)

    def unlink(self, node: int, body: bytes) -> bytes:
        os.unlink(self._named(node, body))
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        os.rmdir(self._named(node, body))
        return b""

    def rename(self, node: int, body: bytes) -> bytes:
        (into,) = struct.unpack_from("<Q", body)
        old, new = body[8:].split(b"\0")[:2]
        source, target = self._named(node, old), self._named(into, new)
        os.rename(source, target)
        for one, path in self._paths.items():
            if path == source or path.startswith(f"{source}/"):
                self._paths[one] = target + path.removeprefix(source)
        return b""

    def open(self, node: int, body: bytes) -> bytes:
        (flags,) = struct.unpack_from("<I", body)
        return self._opened(os.open(self._paths[node], flags & ~os.O_EXCL & ~os.O_NOFOLLOW))

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode = struct.unpack_from("<II", body)
        path = self._named(node, body[16:])
        descriptor = os.open(path, flags | os.O_CREAT, mode)
        return self._entry(path) + self._opened(descriptor)

    def read(self, node: int, body: bytes) -> bytes:
        descriptor, offset, size = struct.unpack_from("<QQI", body)
        return os.pread(descriptor, size, offset)

    def write(self, node: int, body: bytes) -> bytes:
        descriptor, offset, size = struct.unpack_from("<QQI", body)
        return struct.pack("<II", os.pwrite(descriptor, body[40 : 40 + size], offset), 0)

    def fsync(self, node: int, body: bytes) -> bytes:
        os.fsync(struct.unpack_from("<Q", body)[0])
        return b""

    def release(self, node: int, body: bytes) -> bytes:
        os.close(struct.unpack_from("<Q", body)[0])
        return b""

    def readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<QQI", body)
        entries = b""
        for at, name in list(enumerate(sorted(os.listdir(self._paths[node])), 1))[offset:]:
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", at, at, len(raw), 0) + raw
            entry += bytes(-len(entry) % 8)
            if len(entries) + len(entry) > size:
                break
            entries += entry
        return entries

    def _named(self, node: int, name: bytes) -> str:
        return f"{self._paths[node]}/{os.fsdecode(name.split(bytes(1))[0])}"

    def _entry(self, path: str) -> bytes:
        os.lstat(path)
        node = next((one for one, known in self._paths.items() if known == path), 0)
        if not node:
            self._last += 1
            node = self._last
            self._paths[node] = path
        return struct.pack("<4QII", node, 0, 0, 0, 0, 0) + self._attributes(node)

    def _opened(self, descriptor: int) -> bytes:
        return struct.pack("<QII", descriptor, NOT_CACHED, 0)

    def _attributes(self, node: int) -> bytes:
        found = os.lstat(self._paths[node])
        times = (int(found.st_atime), int(found.st_mtime), int(found.st_ctime), 0, 0, 0)
        what = (found.st_mode, found.st_nlink, found.st_uid, found.st_gid, 0, 4096, 0)
        return ATTRIBUTES.pack(node, found.st_size, found.st_blocks, *times, *what)


KINDS = {
    1: Folder.lookup, 2: Folder.forget, 3: Folder.getattr, 4: Folder.setattr, 9: Folder.mkdir, 10: Folder.unlink,
    11: Folder.rmdir, 12: Folder.rename, 14: Folder.open, 15: Folder.read, 16: Folder.write, 18: Folder.release,
    20: Folder.fsync, 26: Folder.init, 27: Folder.open, 28: Folder.readdir, 29: Folder.release, 30: Folder.fsync,
    35: Folder.create, 42: Folder.forget,
}  # fmt: skip

if __name__ == "__main__":
    main(*sys.argv[1:])
