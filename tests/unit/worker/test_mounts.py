"""Which mount holds a path, from the text of mountinfo alone."""

import pytest

from ckptd import errors
from ckptd.worker import mounts

TABLE = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 master:2 - ext4 /dev/vda rw
40 27 0:40 / /mnt/data rw - nfs4 server:/x rw
41 40 8:1 / /mnt/data/fast rw - xfs /dev/nvme0n1 rw
42 27 0:42 / /mnt/with\040blank\134slash rw - fuse.sshfs me@host:/ rw
43 27 8:3 / /old/deep rw - ext4 /dev/c rw
44 27 8:4 / /old rw - btrfs /dev/d rw
45 27 8:5 / /twice rw - ext4 /dev/e rw
46 45 0:46 / /twice rw - tmpfs tmpfs rw
nonsense
"""
KNOWN = mounts.parse(TABLE)


@pytest.mark.parametrize(
    ("path", "point", "filesystem"),
    [
        ("/", "/", "ext4"),
        ("/home/me", "/", "ext4"),
        ("/mnt/data", "/mnt/data", "nfs4"),
        ("/mnt/database", "/", "ext4"),
        ("/mnt/data/x", "/mnt/data", "nfs4"),
        ("/mnt/data/fast/x", "/mnt/data/fast", "xfs"),
        ("/mnt/data/fast/../x", "/mnt/data", "nfs4"),
        ("//mnt//data/", "/mnt/data", "nfs4"),
        ("/mnt/with blank\\slash/x", "/mnt/with blank\\slash", "fuse.sshfs"),
        ("/twice/x", "/twice", "tmpfs"),
    ],
)
def test_a_path_belongs_to_the_mount_a_look_up_would_end_in(path, point, filesystem):
    found = mounts.find(path, KNOWN)
    assert (found.point, found.filesystem) == (point, filesystem)


def test_a_mount_hidden_by_a_later_one_above_it_is_not_taken():
    """/old/deep was mounted first, then /old over its parent: the longest prefix would be the wrong answer."""
    assert mounts.find("/old/deep/x", KNOWN).filesystem == "btrfs"


def test_a_relative_path_is_refused():
    with pytest.raises(errors.BadPath):
        mounts.find("runs", KNOWN)


def test_no_table_no_answer():
    with pytest.raises(errors.BadPath):
        mounts.find("/x", ())


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "lustre", "fuse", "fuse.sshfs", "cifs", "9p", "virtiofs"])
def test_network_and_fuse_file_systems_are_remote(kind):
    assert mounts.is_remote(kind)


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs", "overlay", "fuseblk", "zfs"])
def test_local_file_systems_are_not_remote(kind):
    assert not mounts.is_remote(kind)


def test_this_machines_own_table_is_understood():
    found = mounts.find("/proc/self", mounts.read())
    assert (found.point, found.filesystem, found.remote) == ("/proc", "proc", False)
