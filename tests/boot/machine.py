"""A machine of its own that boots a real systemd, in a container.

Strategy: the image is made once with `debootstrap` and kept; each machine runs on a layer in memory
above it, so that nothing a test does is ever in the image.  Program and interpreter are the test's
own, bound into it read-only.  Its network is its own; a client of the tests enters that alone.
The machine ends with the test run at the latest.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pkvpn.watchdog import procfs
from tests.support import eventually
from tests.system.bed import ROOT, run

SUITE = "bookworm"
PACKAGES = (
    "dbus", "iproute2", "libpam-systemd", "openssh-client", "openssh-server", "polkitd", "procps",
    "psmisc", "python3", "systemd", "systemd-sysv",
)  # fmt: skip
# Of what the image is made: another list is another image.
IMAGE = f"{SUITE}-2"
_IMAGE_TIMEOUT = 400.0
BOOT_TIMEOUT = 60.0


def image_directory() -> Path:
    """Where images are kept: PKVPN_IMAGES, or the user's cache."""
    known = os.environ.get("PKVPN_IMAGES")
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(known) if known else Path(cache, "pkvpn-images")


# Beside what is there, without a word to dpkg: their own packages would conflict.
_UNPACK = """
mkdir /tmp/more
cd /tmp/more
apt-get -o APT::Sandbox::User=root download "$@"
for one in *.deb; do
    dpkg-deb --fsys-tarfile "$one" | tar -x --skip-old-files -C /
done
rm -r /tmp/more
"""


def image(name: str, packages: Iterable[str], unpacked: Iterable[str] = ()) -> Path:
    """The image, made if it is not there yet.  Raises AssertionError with what went wrong."""
    made = image_directory() / name
    if not made.exists():
        made.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=made.parent, ignore_cleanup_errors=True) as scratch:
            root = Path(scratch, "root")
            run(
                "debootstrap", "--variant=minbase", f"--include={','.join(packages)}",
                SUITE, str(root), timeout=_IMAGE_TIMEOUT,
            )  # fmt: skip
            if unpacked:
                run(
                    "chroot",
                    str(root),
                    "sh",
                    "-ec",
                    _UNPACK,
                    "sh",
                    *unpacked,
                    timeout=_IMAGE_TIMEOUT,
                )
            shutil.rmtree(root / "var/cache/apt")
            root.rename(made)
    return made


def why_not() -> str:
    """Why no machine can boot here, or nothing; found out by booting one."""
    absent = [name for name in ("debootstrap", "systemd-nspawn") if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if os.geteuid():
        return "not root"
    try:
        with contextlib.closing(Machine()) as machine:
            machine.boot()
    except (AssertionError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return f"no machine boots in systemd-nspawn: {error}"
    return ""


class Machine:
    """One container, from the first boot to the poweroff."""

    image: str = IMAGE
    packages: tuple[str, ...] = PACKAGES
    unpacked: tuple[str, ...] = ()
    init = "systemd"  # what its first process is called

    def __init__(self) -> None:
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the machine
        # What a reboot must find again lies beside the image.
        self._scratch = tempfile.TemporaryDirectory(
            dir="/dev/shm", prefix="pkvpn-machine-", ignore_cleanup_errors=True
        )
        root = image(self.image, self.packages, self.unpacked)
        kept = []
        for name in ("etc", "var"):
            upper = Path(self._scratch.name, name)
            upper.mkdir(mode=0o755)
            kept.append(f"--overlay={root / name}:{upper}:/{name}")
        bound = {str(ROOT), sys.prefix}
        if not sys.base_prefix.startswith("/usr"):
            bound.add(sys.base_prefix)
        # A control group of its own, in which nspawn makes two that have the same names for all.
        self._group = Path(_unified(), f"pkvpn-machine-{os.getpid()}-{id(self)}")
        # What nspawn leaves in /run goes with it.
        prepare = 'echo 0 > "$1" && shift && mount -t tmpfs none /run && exec "$@"'
        self._command = [
            *("setpriv", "--pdeathsig", "KILL"),
            *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("sh", "-c", prepare, "sh", str(self._group / "cgroup.procs")),
            *("systemd-nspawn", "--quiet", f"--directory={root}", "--volatile=overlay"),
            *("--register=no", "--keep-unit", "--private-network", "--console=pipe"),
            *(f"--machine=pkvpn-{os.getpid()}-{id(self) % 10000}", "--boot"),
            *kept,
            *(f"--bind-ro={path}" for path in sorted(bound)),
        ]
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.program = [sys.executable, "-m", "pkvpn"]
        self.pid = 0  # of its process 1, seen from outside

    def boot(self) -> None:
        """Return when everything that belongs to the boot is up."""
        self._group.mkdir(exist_ok=True)
        self._nspawn = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
            env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
        )  # fmt: skip
        self.pid = eventually(self._find_init, within=BOOT_TIMEOUT)
        eventually(self.is_up, within=BOOT_TIMEOUT, every=0.05)

    def _find_init(self) -> int:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise RuntimeError(f"it ended with {self._nspawn.returncode}: {self.said()}")
        for pid in procfs.descendants(self._nspawn.pid):
            # In the namespace of nspawn it has another number, and in its own it is the first.
            status = Path(f"/proc/{pid}/status").read_text()
            if re.search(rf"^Name:\t{self.init}$", status, re.MULTILINE) and re.search(
                r"^NSpid:\t\d+\t\d+\t1$", status, re.MULTILINE
            ):
                return pid
        return 0

    def said(self) -> str:
        """What nspawn and the machine's console have said."""
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def is_up(self) -> bool:
        done = self.do("systemctl", "is-system-running", check=False)
        return done.stdout.strip() in ("running", "degraded")

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command as root of the machine."""
        return [
            *("nsenter", "--target", str(self.pid), "--all"),
            *("env", "-i", "--chdir=/", "PATH=/usr/sbin:/usr/bin", "HOME=/root", "LANG=C.UTF-8"),
            *(f"PYTHONPATH={ROOT}", *command),
        ]

    def beside(self, *command: str) -> list[str]:
        """The same with the machine's network only."""
        return ["nsenter", "--target", str(self.pid), "--net", "--", *command]

    def do(
        self, *command: str, check: bool = True, timeout: float = 60.0, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.enter(*command), input=stdin, capture_output=True, text=True,
            timeout=timeout, check=False,
        )  # fmt: skip
        if check:
            said = f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
            assert done.returncode == 0, said
        return done

    def vpnserver(self, *line: str, **more: Any) -> subprocess.CompletedProcess[str]:
        return self.do(*self.program, *line, **more)

    def put(self, path: Path) -> str:
        """Copy a file onto the machine; returns where it is there."""
        shutil.copy(path, f"/proc/{self.pid}/root/root/{path.name}")
        return f"/root/{path.name}"

    def show(self, name: str) -> str:
        """A property of the service's unit."""
        return self.do(
            "systemctl", "show", f"--property={name}", "--value", "vpnserver"
        ).stdout.strip()

    def watchdog(self) -> int:
        return int(self.show("MainPID"))

    def journal(self) -> str:
        return self.do(
            "journalctl", "--no-pager", "--output=short-monotonic", "-u", "vpnserver"
        ).stdout

    def kept(self, path: str) -> str:
        """A file of /etc or /var, also while the machine is off."""
        return Path(self._scratch.name, path).read_text()

    def wait_off(self) -> None:
        """Until it has powered itself off, or is about to boot again."""
        assert self._nspawn is not None
        self._nspawn.wait(timeout=60.0)

    def close(self) -> None:
        if self._nspawn is not None and self._nspawn.poll() is None:
            self._nspawn.kill()
            self._nspawn.wait()
        self._said.close()
        self._scratch.cleanup()
        eventually(self._remove_group, every=0.05)

    def _remove_group(self) -> bool:
        for path, _, _ in os.walk(self._group, topdown=False):
            os.rmdir(path)
        return not self._group.exists()


def _unified() -> str:
    """Where the control groups of version 2 are."""
    for line in Path("/proc/mounts").read_text().splitlines():
        if line.split()[2] == "cgroup2":
            return line.split()[1]
    raise OSError("no control groups of version 2 are mounted")
