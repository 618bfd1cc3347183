"""Cases of `capture_store`: rows kept by slot on the host, read in another process."""

from __future__ import annotations

from moe_conformance.catalogue.case import Case


def _store(name: str, clause: str, **recipe: object) -> Case:
    return Case(f"store-{name}", stage="capture_store", clause=clause, recipe=recipe)


READER = (_store("reader-in-another-process", "capture.other-process"),)
TORN = (_store("no-torn-rows", "capture.other-process"),)
OWNER_KILLED = (_store("owner-killed", "capture.other-process"),)
OWNER_CLOSES = (_store("owner-closes", "capture.other-process"),)
# Slots of three chunks of one prompt, with another request's in between, and slots that change hands.
SLOTS_CHANGE_HANDS = (_store("slots-of-chunks", "capture.only-real-rows"),)
TWO = (_store("two-stores", "capture.only-real-rows"),)
NARROW = tuple(
    _store(f"narrow-e{experts}", "capture.narrow", experts=experts) for experts in (128, 256, 257, 896, 40000)
)
# All bits set is -1, and in a byte the last of 256 experts.
NARROW_NONE = tuple(
    _store(f"minus-one-e{experts}", "capture.narrow", experts=experts, needs=("unwritten",))
    for experts in (128, 255, 256, 257, 32768)
)
# "unwritten": a slot that nobody wrote reads as -1, or raises.
UNWRITTEN = (_store("unwritten-slots", "capture.only-real-rows", needs=("unwritten",)),)
BOUNDS = tuple(
    _store(f"slot-{name}", "capture.bounds", slot=slot)
    for name, slot in {"minus-one": -1, "one-past": 11, "far-past": 4000}.items()
)
# As a session's: ids that narrowing would make legal, and the first that is none.
EXPERT_BOUNDS = tuple(
    _store(f"expert-{name}", "capture.bounds", experts=experts, expert_id=expert_id, needs=needs)
    for name, experts, expert_id, needs in (
        ("one-past", 250, 250, ("expert_bounds",)),
        ("minus-two", 250, -2, ("expert_bounds",)),
        ("two-to-8", 250, 2**8 + 7, ()),
        ("two-to-16", 40000, 2**16 + 7, ()),
    )
)

CASES = (
    *READER,
    *TORN,
    *OWNER_KILLED,
    *OWNER_CLOSES,
    *SLOTS_CHANGE_HANDS,
    *TWO,
    *NARROW,
    *NARROW_NONE,
    *UNWRITTEN,
    *BOUNDS,
    *EXPERT_BOUNDS,
)
