"""What figures mean, over random figures; and which checkpoint is the one before, over random names."""

from hypothesis import given
from hypothesis import strategies as st

from ckptd.hooks.builtin.arithmetic import Figures
from ckptd.hooks.builtin.health import Limits, judge
from ckptd.hooks.builtin.neighbour import before
from ckptd.hooks.builtin.plain import Tally

FIGURES = st.builds(
    Tally,
    elements=st.just(100),
    nan=st.integers(0, 2),
    inf=st.integers(0, 2),
    zero=st.sampled_from([0, 100]),
    largest=st.floats(0, 1e8),
    norm=st.floats(0, 1e9),
)


@given(st.dictionaries(st.sampled_from("abcdef"), FIGURES), st.dictionaries(st.sampled_from("abcdef"), FIGURES))
def test_every_new_nan_is_an_error_and_nothing_is_worse_than_it_was(now, earlier):
    def of(tallies):
        return Figures(1, tallies, dict.fromkeys(tallies, (100,)), dict.fromkeys(tallies, "F32"))

    verdict = judge(of(now), of(earlier), Limits())
    fresh = any(
        getattr(tally, kind) and (key not in earlier or getattr(earlier[key], kind) != getattr(tally, kind))
        for key, tally in now.items()
        for kind in ("nan", "inf")
    )
    assert (verdict.level == "error") == fresh
    assert len(verdict.facts()["named"]) <= 20
    # What has not changed is no alarm; but nothing is made of NaN, so they are never sound.
    assert judge(of(now), of(now), Limits()).level == ("warning" if any(one.nan for one in now.values()) else "info")


@given(st.lists(st.integers(0, 2000), unique=True), st.integers(1, 2000))
def test_the_checkpoint_before_is_the_highest_step_below(steps, own):
    names = [f"step_{step:010d}" for step in steps]
    found = before(f"step_{own:010d}", [*names, "latest", ".step_0000000001.ckptd-tmp", "optimizer_1.pt"])
    below = [step for step in steps if step < own]
    assert found == (f"step_{max(below):010d}" if below else None)
