"""The model allows what real file systems were seen to do, and nothing that an fsync forbids."""

import pytest

from tests.model.disk import Disk, Profile
from tests.model.explore import Found, Tree, trees
from tests.model.extent import SECTOR, Extent
from tests.model.log import ROOT, Drop, Log, Make, Move, Op, Start, Sync, Write
from tests.model.mutants import without

OLD, NEW = b"old " * 300, b"new " * 300
TMP, FINAL = (ROOT, "tmp"), (ROOT, "final")
WRITTEN: tuple[Op, ...] = (Make(TMP, 1, "file"), Write(1, 0, NEW))
SYNCED, RENAMED, DIRECTORY = Sync(1, "file"), Move(TMP, FINAL, 1), Sync(ROOT, "directory")
EMPTY = Start({}, {ROOT: "directory"}, {}, {})
WITH_OLD = Start({FINAL: 9}, {ROOT: "directory", 9: "file"}, {9: OLD}, {})
ZEROS = bytes(len(NEW))


def left(start: Start, profile: Profile, *ops: Op) -> list[Tree]:
    return list(trees(Disk.after(Log(start, ops), profile), fine=True, found=Found()))


@pytest.mark.parametrize("profile", Profile)
@pytest.mark.parametrize(
    ("start", "ops", "seen"),
    [
        (EMPTY, WRITTEN, {}),
        (EMPTY, (*WRITTEN, RENAMED), {}),
        (EMPTY, (*WRITTEN, RENAMED, DIRECTORY), {"final": b""}),
        (WITH_OLD, (*WRITTEN, RENAMED), {"final": OLD}),
        (WITH_OLD, (*WRITTEN, RENAMED, DIRECTORY), {"final": ZEROS}),
        (WITH_OLD, (*WRITTEN, RENAMED, DIRECTORY), {"final": b""}),
        (EMPTY, (*WRITTEN, SYNCED, RENAMED), {"tmp": NEW}),
        (EMPTY, (*WRITTEN, SYNCED, RENAMED, DIRECTORY), {"final": NEW}),
        (WITH_OLD, (Drop(FINAL, 9),), {"final": OLD}),
    ],
)
def test_what_real_power_cuts_left_is_among_the_states(
    profile: Profile, start: Start, ops: tuple[Op, ...], seen: Tree
) -> None:
    """Measured on ext4 and XFS: the last state of each row is what their images held."""
    if profile is Profile.WEAKEST and seen == {"tmp": NEW}:
        assert {} in left(start, profile, *ops)  # the file's fsync says nothing of its name
    assert seen in left(start, profile, *ops)


@pytest.mark.parametrize("profile", Profile)
def test_temporary_name_fsync_rename_and_fsync_of_the_directory_leave_one_state(profile: Profile) -> None:
    assert left(EMPTY, profile, *WRITTEN, SYNCED, RENAMED, DIRECTORY) == [{"final": NEW}]


@pytest.mark.parametrize("profile", Profile)
def test_a_rename_over_an_old_file_leaves_the_old_or_the_new(profile: Profile) -> None:
    found = [tree.get("final") for tree in left(WITH_OLD, profile, *WRITTEN, SYNCED, RENAMED)]
    assert set(found) == {OLD, NEW}


def test_only_the_weakest_renames_between_directories_in_two_steps() -> None:
    here, there = (1, "it"), (2, "it")
    start = Start(
        {(ROOT, "a"): 1, (ROOT, "b"): 2, here: 3},
        {ROOT: "directory", 1: "directory", 2: "directory", 3: "file"},
        {3: OLD},
        {},
    )
    moved = Move(here, there, 3)

    def names(profile: Profile, *ops: Op) -> set[tuple[str, ...]]:
        return {tuple(path for path, found in tree.items() if found is not None) for tree in left(start, profile, *ops)}

    assert names(Profile.EXT4, moved) == {("a/it",), ("b/it",)}
    assert names(Profile.WEAKEST, moved) == {("a/it",), ("b/it",), ("a/it", "b/it")}
    assert names(Profile.WEAKEST, moved, Sync(1, "the old one alone")) == {(), ("b/it",)}
    assert names(Profile.WEAKEST, moved, Sync(2, "new"), Sync(1, "old")) == {("b/it",)}


def test_sectors_reach_the_disk_one_by_one() -> None:
    extent = Extent(b"a" * SECTOR * 3)
    extent.write(0, b"b" * SECTOR * 3)
    assert {data[::SECTOR] for data in extent.contents(fine=True, foreign=False)} == {
        bytes([x, y, z]) for x in b"ab" for y in b"ab" for z in b"ab"
    }
    extent.sync()
    assert extent.contents(fine=True, foreign=False) == (b"b" * SECTOR * 3,)


def test_a_sector_written_twice_may_hold_any_version() -> None:
    extent = Extent(b"1" * SECTOR)
    for version in (b"2", b"3"):
        extent.write(0, version * SECTOR)
    assert {data[:1] for data in extent.contents(fine=True, foreign=False)} == {b"1", b"2", b"3"}


@pytest.mark.parametrize("profile", Profile)
def test_after_a_failed_fsync_a_later_one_proves_nothing(profile: Profile) -> None:
    failed = Sync(1, "file", failed=True)
    ops = (*WRITTEN, DIRECTORY, failed, Sync(1, "again"))
    assert {"tmp": ZEROS} in left(EMPTY, profile, *ops)
    mended = (*ops, Write(1, 0, NEW), Sync(1, "of what was written again"))
    assert left(EMPTY, profile, *mended) == [{"tmp": NEW}]


def test_a_name_whose_fsync_failed_lasts_once_it_is_made_again() -> None:
    failed = (*WRITTEN, SYNCED, Sync(ROOT, "directory", failed=True))
    assert {} in left(EMPTY, Profile.WEAKEST, *failed, DIRECTORY)
    again = (*failed, Drop(TMP, 1), Make(FINAL, 2, "file"), Write(2, 0, OLD), Sync(2, "file"), DIRECTORY)
    assert {tree.get("final") for tree in left(EMPTY, Profile.WEAKEST, *again)} == {OLD}


def test_a_log_without_an_fsync_has_more_states() -> None:
    log = Log(EMPTY, (*WRITTEN, SYNCED, RENAMED, DIRECTORY))
    more = without([log], "file").logs[0]
    assert len(left(EMPTY, Profile.EXT4, *more.ops)) > len(left(EMPTY, Profile.EXT4, *log.ops))
