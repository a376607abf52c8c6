"""Boots a guest with vhost-user-fs devices under QEMU's emulation, in two seconds, and runs scripts in it.

    with Guest([Share(socket, "fs")], disks=[Disk(image, "oracle")]) as guest:
        result = guest.run("mount -t virtiofs fs /mnt && python3 -m fusewire.testing /mnt /oracle", timeout=60)

A script is run by the busybox shell as root, with /dev/null as its input. What it writes comes back byte for byte, its
exit status exactly. The guest has Python in /usr/bin (`images.userland`), this package in its PYTHONPATH, /mnt and
/oracle as empty directories, and the disks as /dev/disk/NAME.

QEMU ends when the thread that started it ends, whatever happens: start guests from the main thread. Everything has a
timeout, as a daemon that does not answer makes scripts hang and not fail: the guest's mount(2) returns before FUSE's
INIT is answered, and QEMU goes on without its daemon. After a timeout the guest can only be ended or rebooted. A script
that may hang is started with `&`, its output in files, and later scripts look at these.
"""

from __future__ import annotations

import base64
import json
import secrets
import selectors
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Self

import pytest

from vm import images

BOOT = 60.0  # seconds that a boot may take: it takes 2, and 5 on a busy machine
PATIENCE = 15.0  # seconds for what QEMU is asked

# Kernel arguments that make an emulated guest start faster; none changes what filesystems do. `nokaslr` is not among
# them: the emulator writes slowly where it still has code of an earlier boot, and the same place again costs 7 s.
ARGUMENTS = (
    "console=ttyS0 quiet loglevel=5 panic=-1 reboot=t mitigations=off random.trust_cpu=on cryptomgr.notests "
    "no_timer_check i8042.noaux i8042.nokbd audit=0 nowatchdog"
)

# Ports: scripts come on "control", one line each: a mark and the script in base64. The same mark ends what the script
# has written on "out" and "err", and comes back on "control" with the exit status.
INIT = r"""#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb LANG=C.UTF-8
export PYTHONPATH=/fusewire PYTHONDONTWRITEBYTECODE=1
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
mkdir -p /dev/pts /dev/shm /dev/disk; mount -t devpts pts /dev/pts; mount -t tmpfs tmp /dev/shm
mount -t tmpfs -o mode=1777 tmp /tmp; mount -t tmpfs -o mode=755 tmp /run; ln -s /proc/self/fd /dev/fd
ip link set lo up 2>&-
for m in /rig/modules/*; do insmod "$m"; done
# A port's name appears only once QEMU has sent it.
for i in $(seq 500); do [ $(ls -d /sys/class/virtio-ports/*/name 2>&- | wc -l) -ge 3 ] && break; usleep 10000; done
for p in /sys/class/virtio-ports/*; do read -r n <"$p/name" && ln -s "/dev/${p##*/}" "/dev/rig-$n"; done
exec 3<>/dev/rig-control 4>/dev/rig-out 5>/dev/rig-err || { echo "rig: the ports are missing"; poweroff -f; }
for d in /sys/block/vd*; do n=; read -r n <"$d/serial"; [ -z "$n" ] || ln -s "/dev/${d##*/}" "/dev/disk/$n"; done 2>&-
[ ! -e /dev/disk/userland ] || mount -t ext4 -o ro,noatime /dev/disk/userland /usr && ln -sf /usr/bin/* /bin/
read -r up _ </proc/uptime; echo "READY $up" >&3
while read -r mark script <&3; do
  [ "$mark" = END ] && break
  echo "$script" | base64 -d >/run/script
  (cd / && exec sh /run/script) </dev/null >&4 2>&5 3>&- 4>&- 5>&-
  status=$?; printf %s "$mark" >&4; printf %s "$mark" >&5; echo "$mark $status" >&3
done
cd /; kill -9 -1; umount -a -r 2>&-; poweroff -f
"""


class RigError(Exception):
    """The guest could not be started, died, or did not answer in time; the message has the end of its console.

    `out` is what a script had written on standard output until then.
    """

    def __init__(self, message: str, out: bytes = b"") -> None:
        super().__init__(message)
        self.out = out


def need(flavour: str = "stable") -> None:
    """Skip a test on a machine where no guest can be booted, with what is missing."""
    if reason := images.missing(flavour):
        pytest.skip(reason)


class Share(NamedTuple):
    """A vhost-user-fs device: the socket that its daemon listens on, and how QEMU is to offer it.

    properties: others that the device has ({"event_idx": False}; `qemu-system-x86_64 -device vhost-user-fs-pci,help`
    tells them).
    """

    socket: str | Path
    tag: str = "fs"
    queues: int = 1
    queue_size: int = 128
    properties: Mapping[str, object] = MappingProxyType({})


class Disk(NamedTuple):
    """An image that the guest has as /dev/disk/NAME. The name: up to 20 characters."""

    image: Path
    name: str
    readonly: bool = False


class Result(NamedTuple):
    """What a script did. seconds: of this machine's clock, with some 20 ms for the way there and back."""

    status: int
    stdout: bytes
    stderr: bytes
    seconds: float


class Guest:
    """A guest that runs. As a context manager, or by `start` and `close`.

    memory: as QEMU has it; "" if `arguments` say it, and that it is shared with daemons. put: (path here, path there)
    of files and directories for the guest's first root. modules: of the kernel, to be loaded besides. flavour: of the
    kernel (`images.fetch`). python: False leaves out Python and `programs`. arguments: more words for QEMU.

    There is no reconnecting: QEMU's device wants its daemon there at the start (with `reconnect=` in its chardev it
    does not start at all), and never looks for another one. `unplug` and `plug` give a share another daemon.
    """

    def __init__(
        self,
        shares: Sequence[Share] = (),
        *,
        memory: str = "1G",
        smp: int = 1,
        disks: Sequence[Disk] = (),
        put: Sequence[tuple[Path, str]] = (),
        programs: Sequence[str] = (),
        python: bool = True,
        modules: Sequence[str] = (),
        flavour: str = "stable",
        cpu: str = "qemu64,+rdrand",
        arguments: Sequence[str] = (),
    ) -> None:
        self.shares = list(shares)
        self.disks = list(disks)
        self.put = list(put)
        self.boot_seconds = 0.0
        self.uptime = 0.0
        self._kernel = images.find_kernel(flavour)
        self._modules = [*images.MODULES, *modules]
        self._machine = ["-smp", str(smp), "-cpu", cpu]
        if memory:
            self._machine += ["-m", memory, "-numa", "node,memdev=memory"]
            self._machine += ["-object", f"memory-backend-memfd,id=memory,size={memory},share=on"]
        self._arguments = list(arguments)
        if python:
            self.disks.append(Disk(images.userland(programs), "userland", readonly=True))
        self._directory: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, _Port] = {}
        self._hung = ""  # the script that does not end

    # Life

    def start(self) -> Self:
        """Boot; returns when the guest waits for scripts."""
        self._directory = Path(tempfile.mkdtemp(prefix="fusewire-vm-"))
        try:
            root = images.initramfs(self._kernel, INIT, self._modules, self.put)
            (self._directory / "initramfs").write_bytes(root)
            self._boot()
        except BaseException:
            self.close(kill=True)
            raise
        return self

    def _boot(self) -> None:
        assert self._directory is not None
        begin = time.monotonic()
        theirs: dict[str, socket.socket] = {}
        try:
            for name in ("control", "out", "err", "qmp"):
                ours, theirs[name] = socket.socketpair()
                self._ports[name] = _Port(ours)
            fds = {name: end.fileno() for name, end in theirs.items()}
            with (self._directory / "qemu").open("wb") as said:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *self._words(fds)],
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                    pass_fds=list(fds.values()),
                )
        finally:
            for end in theirs.values():
                end.close()
        self._line("qmp", begin + BOOT)  # the greeting
        self.qmp("qmp_capabilities")
        self._ready(begin)

    def _ready(self, begin: float) -> None:
        """Wait for the guest's word that it is up."""
        word = uptime = ""
        while word != "READY":  # before a reset something else may have been on its way
            word, _, uptime = self._line("control", begin + BOOT).partition(" ")
        self.boot_seconds, self.uptime = time.monotonic() - begin, float(uptime)
        self._hung = ""

    def _words(self, fds: dict[str, int]) -> list[str]:
        words = [*self._kernel.qemu, "-accel", "tcg", "-machine", "q35", *self._machine]
        words += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        words += ["-serial", f"file:{self._directory}/console", "-kernel", str(self._kernel.image)]
        words += ["-initrd", f"{self._directory}/initramfs", "-append", ARGUMENTS, "-device", "virtio-serial-pci"]
        for name, fd in fds.items():
            words += ["-chardev", f"socket,id={name},fd={fd}"]
            if name == "qmp":
                words += ["-mon", "chardev=qmp,mode=control"]
            else:
                words += ["-device", f"virtserialport,chardev={name},name={name}"]
        for disk in self.disks:
            readonly = "on" if disk.readonly else "off"
            words += ["-drive", f"if=none,id=disk-{disk.name},format=raw,file={disk.image},readonly={readonly}"]
            words += ["-device", f"virtio-blk-pci,drive=disk-{disk.name},serial={disk.name}"]
        for number, share in enumerate(self.shares):
            # The root bus takes nothing while the machine runs, a port does.
            words += ["-device", f"pcie-root-port,id=port{number},chassis={number}"]
            words += ["-chardev", f"socket,id=daemon{number},path={share.socket}"]
            words += ["-device", json.dumps(self._device(share, number))]
        return [*words, *self._arguments]

    def _device(self, share: Share, number: int) -> dict[str, object]:
        return {
            "driver": "vhost-user-fs-pci",
            "id": f"fs{number}",
            "bus": f"port{number}",
            "chardev": f"daemon{number}",
            "tag": share.tag,
            "num-request-queues": share.queues,
            "queue-size": share.queue_size,
            **share.properties,
        }

    def close(self, *, kill: bool = False) -> None:
        """Have the guest unmount everything and power off, or end QEMU at once; then remove everything."""
        process, self._process = self._process, None
        try:
            if process is not None:
                if not kill and not self._hung and process.poll() is None:
                    try:
                        self._ports["control"].socket.sendall(b"END\n")
                        process.wait(5)
                    except (OSError, subprocess.TimeoutExpired):
                        pass  # it is ended below
                if process.poll() is None:
                    process.kill()
                process.wait()
        finally:
            for port in self._ports.values():
                port.socket.close()
            if self._directory is not None:
                shutil.rmtree(self._directory)
                self._directory = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: object, *rest: object) -> None:
        self.close(kill=kind is not None)

    @property
    def pid(self) -> int:
        """QEMU's process."""
        assert self._process is not None, "the guest has been ended"
        return self._process.pid

    # Scripts

    def run(self, script: str, timeout: float = 30.0) -> Result:
        """Run a script in the guest. Raises RigError if it takes longer than `timeout` seconds or the guest dies."""
        if self._hung:
            raise RigError(f"an earlier script still hangs: {self._hung[:200]}")
        begin = time.monotonic()
        mark = f"rig{secrets.token_hex(12)}"
        ends = [self._ports[name] for name in ("out", "err")]
        for port in ends:
            port.expect(mark.encode())
        self._send("control", f"{mark} {base64.b64encode(script.encode()).decode()}\n")
        self._hung = script
        self._receive(lambda: all(port.end >= 0 for port in ends), begin + timeout, repr(script))
        answered, _, status = self._line("control", begin + timeout + PATIENCE).partition(" ")
        assert answered == mark
        self._hung = ""
        out, err = (port.take() for port in ends)
        return Result(int(status), out, err, time.monotonic() - begin)

    def reloading(self) -> str:
        """The script that unloads and loads the driver; skips the test where the kernel has it built in (Debian 13)."""
        if self.run("ls /rig/modules/*-virtiofs.ko").status:
            pytest.skip("virtiofs is no module of this kernel")
        return "rmmod virtiofs && insmod /rig/modules/*-virtiofs.ko"

    def check(self, script: str, timeout: float = 30.0) -> bytes:
        """Run a script that is to succeed; gives what it writes on standard output."""
        result = self.run(script, timeout)
        said = result.stderr.decode(errors="replace")
        assert result.status == 0, f"status {result.status} of {script!r} in the guest: {said}"
        return result.stdout

    def reboot(self, script: str = "") -> None:
        """Reset the machine as its button does, or by a script that ends in `reboot -f`; returns when it is up again.

        What was plugged in stays, what ran is gone, also a script that hung.
        """
        begin = time.monotonic()
        self.qmp("set-action", reboot="reset")
        self._discard()
        if script:
            self._send("control", f"none {base64.b64encode(script.encode()).decode()}\n")
        else:
            self.qmp("system_reset")
        self._ready(begin)
        self.qmp("set-action", reboot="shutdown")  # one that nobody asked for, after a panic, ends the guest
        self._discard()

    def _discard(self) -> None:
        """Drop what scripts wrote that nobody waits for any longer."""
        for name in ("control", "out", "err"):
            self._ports[name].drain()

    # QEMU

    def qmp(self, execute: str, **arguments: object) -> Any:
        """Have QEMU execute a command (qemu-qmp-ref(7)) and give what it returns. Raises RigError if it refuses."""
        self._send("qmp", json.dumps({"execute": execute, "arguments": arguments}) + "\n")
        while True:
            answer = json.loads(self._line("qmp", time.monotonic() + PATIENCE))
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise RigError(f"QEMU refuses {execute}: {answer['error']['desc']}")
            self._ports["qmp"].events.append(answer)

    def wait_event(self, name: str, **data: object) -> None:
        """Wait for an event of QMP with this data among its own; those before it are forgotten."""
        events = self._ports["qmp"].events
        while True:
            while events:
                event = events.pop(0)
                if event["event"] == name and data.items() <= event.get("data", {}).items():
                    return
            events.append(json.loads(self._line("qmp", time.monotonic() + PATIENCE)))

    def unplug(self, number: int = 0) -> None:
        """Take out a share, by its place in `shares`; returns when the guest and QEMU have let it go."""
        self.qmp("device_del", id=f"fs{number}")
        self.wait_event("DEVICE_DELETED", device=f"fs{number}")
        self.qmp("chardev-remove", id=f"daemon{number}")

    def plug(self, number: int = 0) -> None:
        """Put a share that was taken out in again. The daemon has to listen; the guest finds the device in a moment."""
        share = self.shares[number]
        address = {"type": "unix", "data": {"path": str(share.socket)}}
        backend = {"type": "socket", "data": {"addr": address, "server": False}}
        self.qmp("chardev-add", id=f"daemon{number}", backend=backend)
        self.qmp("device_add", **self._device(share, number))

    # Ports

    def _send(self, name: str, text: str) -> None:
        port = self._ports[name].socket
        port.settimeout(PATIENCE)
        try:
            port.sendall(text.encode())
        except OSError as error:
            raise RigError(f"the guest is gone: {error}\n{self.console()}") from None

    def _line(self, name: str, deadline: float) -> str:
        """The next line that comes on a port."""
        port = self._ports[name]
        self._receive(lambda: b"\n" in port.data, deadline, f"a line on {name}")
        line, _, rest = port.data.partition(b"\n")
        port.data[:] = rest
        return line.decode(errors="replace").strip()

    def _receive(self, ready: Callable[[], bool], deadline: float, what: str) -> None:
        """Take in what comes on all ports until `ready`."""
        with selectors.DefaultSelector() as selector:
            for port in self._ports.values():
                selector.register(port.socket, selectors.EVENT_READ, port)
            while not ready():
                found = selector.select(max(0.0, deadline - time.monotonic()))
                if not found:
                    said = [f"--- {name}\n{self._ports[name].tail()}" for name in ("out", "err")]
                    out = bytes(self._ports["out"].data)
                    raise RigError("\n".join([f"no end in time of {what}", *said, self.console()]), out)
                for key, _ in found:
                    port = key.data
                    if not port.feed():
                        raise RigError(f"the guest died, at {what}\n{self.console()}")

    def console(self, lines: int = 25) -> str:
        """The end of what QEMU and the guest's kernel have said."""
        parts = []
        for name in ("qemu", "console"):
            path = self._directory / name if self._directory else None
            text = path.read_text(errors="replace") if path and path.exists() else ""
            parts.append("\n".join([f"--- {name}", *text.splitlines()[-lines:]]))
        return "\n".join(parts)


class _Port:
    """Our end of a port of the guest, with what has come and was not taken."""

    def __init__(self, end: socket.socket) -> None:
        self.socket = end
        self.data = bytearray()
        self.mark = b""
        self.end = -1
        self.events: list[dict[str, Any]] = []

    def expect(self, mark: bytes) -> None:
        """Begin to look for what will end a script's output."""
        self.data.clear()
        self.mark, self.end = mark, -1

    def feed(self) -> bool:
        """Take in what there is; False when the other end is gone."""
        self.socket.settimeout(PATIENCE)
        try:
            chunk = self.socket.recv(1 << 20)
        except ConnectionResetError:  # it died with something unread
            return False
        self.data += chunk
        if self.mark and self.end < 0:
            self.end = self.data.find(self.mark, max(0, len(self.data) - len(chunk) - len(self.mark)))
        return bool(chunk)

    def take(self) -> bytes:
        """Everything before the mark."""
        found = bytes(self.data[: self.end])
        self.data.clear()
        return found

    def tail(self) -> str:
        """The last of what has come."""
        return self.data[-1000:].decode(errors="replace")

    def drain(self) -> None:
        """Drop everything that has come."""
        self.socket.setblocking(False)
        try:
            while self.socket.recv(1 << 20):
                pass
        except BlockingIOError:
            pass
        self.data.clear()
