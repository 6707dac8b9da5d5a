"""Which mount holds a path: answered from the path's text and /proc/self/mountinfo alone.

The path is never touched, so a hung file system can't hang the one who asks. The text must
therefore be the real path: a symlink in it that leads to another mount is not seen.
"""

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ckptd.errors import BadPath, Busy

MOUNTINFO = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
_FIELDS_MIN = 10

# Where another host may change files without this kernel seeing it: no event tells, so poll.
# fmt: off
_REMOTE = frozenset({
    "9p", "afs", "beegfs", "beegfs_nodev", "ceph", "cifs", "coda", "daosfs", "exfs", "gfs", "gfs2",
    "glusterfs", "gpfs", "lustre", "mmfs", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "panfs", "prl_fs",
    "pvfs2", "smb2", "smb3", "smbfs", "vboxsf", "virtiofs", "vmhgfs", "wekafs",
})
# fmt: on


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo.

    `number` names this mount for as long as it lives, even when another one is mounted over it;
    `filesystem` is the kernel's type name ("ext4", "fuse.sshfs").
    """

    number: int
    parent: int
    point: str
    filesystem: str
    source: str

    @property
    def remote(self) -> bool:
        """Whether changes may come unseen: network, host-shared and FUSE file systems."""
        return is_remote(self.filesystem)


def is_remote(filesystem: str) -> bool:
    """Say whether files of this type may change without this kernel telling.

    >>> is_remote("nfs4"), is_remote("fuse.sshfs"), is_remote("fuseblk"), is_remote("ext4")
    (True, True, False, False)
    """
    kind = filesystem.partition(".")[0]
    return kind in _REMOTE or kind == "fuse"  # "fuseblk" is a local disk behind FUSE


def read(mountinfo: Path = MOUNTINFO) -> tuple[Mount, ...]:
    """Return all mounts this process sees. Blocks, but only on the kernel's own table. Busy without a descriptor."""
    try:
        return parse(mountinfo.read_text(errors="surrogateescape"))
    except OSError as error:
        message = f"the table of mounts can't be read: {error.strerror}"
        raise Busy(message, retry_after_s=1.0) from error


def parse(text: str) -> tuple[Mount, ...]:
    """Turn mountinfo's text into mounts, oldest first; a line that has no sense is skipped."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) < _FIELDS_MIN or "-" not in fields:
            continue
        filesystem, source = fields[fields.index("-") + 1 :][:2]
        found.append(Mount(int(fields[0]), int(fields[1]), _plain(fields[4]), _plain(filesystem), _plain(source)))
    return tuple(found)


def find(path: str, mounts: Iterable[Mount]) -> Mount:
    """Return the mount that a look-up of `path` would end in. BadPath when it is not absolute.

    Walks the tree of mounts from the root, so that a mount hidden by one above it is not taken:
    of two mounts below the same one, the shorter path hides the longer.
    """
    if not path.startswith("/"):
        message = f"{path!r} is not absolute"
        raise BadPath(message)
    target = posixpath.normpath("/" + path.lstrip("/"))
    known = tuple(mounts)
    children: dict[int, list[Mount]] = {}
    for mount in known:
        if mount.number != mount.parent and _holds(mount.point, target):
            children.setdefault(mount.parent, []).append(mount)
    numbers = {mount.number for mount in known}
    tops = [m for m in known if m.point == "/" and (m.parent not in numbers or m.parent == m.number)]
    if not tops:
        message = f"no mount holds {path!r}"
        raise BadPath(message)
    here = tops[-1]
    while below := children.pop(here.number, None):
        here = min(below, key=lambda mount: len(mount.point))
    return here


def _holds(point: str, target: str) -> bool:
    return point in {"/", target} or target.startswith(point + "/")


def _plain(text: str) -> str:
    """Undo the octal escapes of blanks and backslashes."""
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)
