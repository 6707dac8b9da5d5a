"""Every protocol that changes a disk, and the fsyncs of theirs that no promise rests on."""

from tests.model import (
    amending,
    fetching,
    linking,
    living,
    marking,
    migrating,
    publishing,
    retiring,
    spooling,
    stripping,
)
from tests.model.publishing import FILES, NESTED, SMALL
from tests.model.scenario import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    publishing.published(NESTED, "publish"),
    publishing.published_beside(SMALL, "publish beside another"),
    publishing.published_by_hand(SMALL),
    publishing.published_with_space_reserved(),
    publishing.digested(),
    publishing.single_digested(),
    linking.made(),
    linking.replaced(),
    linking.removed(),
    linking.replaced_by_hand(),
    retiring.retired(),
    retiring.restored(),
    retiring.restored_into_nothing(),
    retiring.purged(),
    retiring.file_purged(),
    retiring.retired_and_purged(),
    retiring.swept(),
    marking.marked(),
    marking.marked_again(),
    amending.amended(),
    amending.amended_again(),
    stripping.stripped(),
    stripping.unstripped(),
    stripping.stripped_and_purged(),
    migrating.snapshot_taken(),
    spooling.image_written(),
    spooling.image_written_again(),
    spooling.offer_written(),
    spooling.taken_out(),
    spooling.gathered(),
    spooling.gathered_from_elsewhere(),
)
# Explored, but no mutants: `begin` and `keep` each make the same names durable, so no single fsync is missed.
CACHES: tuple[Scenario, ...] = (fetching.fetched_and_kept(), fetching.dropped())
LIFE = living.lived()
LARGE = publishing.published(
    {"model.safetensors": FILES["model.safetensors"], "state.json": b"{}"}, "publish a file of many sectors"
)

# Part of a site -> why the call stays though nothing that we promise needs it there. test_teeth.py
# fails for an entry that is wrong (its mutant is caught) and for a survivor that is not listed.
NOT_NEEDED = {
    "durable.remove_tree:{} < durable.discard": "a temporary name that comes back is nobody's promise: a sweep finds it",
    "durable.remove_tree:{} < sweep": "the same",
    "trash._trash_at:{} < trash._restore": "what it finds in the trash was moved there after the trash's own name was durable",
    "trash._trash_at:{} < trash.purge": "the same",
    "strip._bin:{} < strip.unstrip": "what it takes back was moved there after the trash's own names were durable",
}
