"""Planning passes: every token once and in order, inside the profiles, and nothing harmed by what runs for nobody."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trtllm_cli.artifacts.tensorrt import ProfileTactics, TensorRTTactics
from trtllm_cli.ops.segment import Segment
from trtllm_cli.runtime.tensorrt import passes
from trtllm_cli.runtime.tensorrt.passes import Planner, reach

CONTEXT, SLOTS = 40, 9
SEEN = (1, CONTEXT, CONTEXT)


@pytest.fixture(autouse=True, scope="module")
def short_reach():
    """Few positions are seen at first, more as sequences grow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_LEAST_SEEN", 4)
        yield


def tactics(batches=(1, 4, 9), rows=6, tokens=12, batch=3, usual=None) -> TensorRTTactics:
    found = [ProfileTactics(name="context", batch=(1, 1, batch), tokens=(1, 8, tokens), rows=(1, 1, rows), seen=SEEN)]
    least = 1
    for most in batches:
        sizes = (least, usual or most, most)
        found.append(ProfileTactics(name=f"generation-{most}", batch=sizes, tokens=(1, 1, 1), rows=sizes, seen=SEEN))
        least, usual = most + 1, None
    return TensorRTTactics(network_layers=1, complete=False, profiles=tuple(found))


class Caches:
    """Runs passes on caches that hold token ids, and checks each against its profile."""

    def __init__(self, tactics: TensorRTTactics) -> None:
        self.tactics = tactics
        self.planner = Planner(tactics, CONTEXT, SLOTS)
        self.held = np.full((SLOTS, CONTEXT), -1)
        #: per slot, the tokens that must be there
        self.due: list[list[int]] = [[] for _ in range(SLOTS)]
        self.passes = self.steadies = 0

    def run(self, segments: list[Segment]) -> list[list[tuple[int, ...]]]:
        """For each segment the rows it got: a row is what its token could attend to."""
        for segment in segments:
            self.due[segment.slot] = self.due[segment.slot][: segment.start] + list(segment.tokens)
        rows: list[list[tuple[int, ...]]] = [[] for _ in segments]
        steady = self.planner.steady(segments, 100)
        self.steadies += steady is not None
        for one in self.planner.plan(segments) if steady is None else [steady]:
            self.passes += 1
            batch, width = one.tokens.shape
            assert self.tactics.profiles[one.profile].takes(batch, width, len(one.rows))
            assert 0 <= one.base <= SLOTS - batch
            assert len(one.owners) == len(one.rows)
            assert one.starts.max() + width <= one.seen <= CONTEXT, "a token, wanted or not, does not see itself"
            for row in range(batch):
                assert 0 <= one.starts[row] <= CONTEXT - width, "written beyond the cache"
                self.held[one.base + row, one.starts[row] : one.starts[row] + width] = one.tokens[row]
            for flat, owner in zip(one.rows, one.owners):
                row, place = divmod(int(flat), width)
                assert row < batch
                if owner >= 0:
                    assert one.base + row == segments[owner].slot
                    rows[owner].append(tuple(self.held[one.base + row, : one.starts[row] + place + 1].tolist()))
        for slot, due in enumerate(self.due):
            assert self.held[slot, : len(due)].tolist() == due, "a sequence was damaged"
        return rows


def expected(caches: Caches, segment: Segment) -> list[tuple[int, ...]]:
    due = caches.due[segment.slot]
    ends = range(segment.start + 1, segment.start + len(segment.tokens) + 1)
    return {"all": [tuple(due[:end]) for end in ends], "last": [tuple(due)], "none": []}[segment.want]


@st.composite
def work(draw):
    """Calls of the executor: each slot goes on where it is, starts again, or goes back."""
    lengths = [0] * SLOTS
    calls = []
    for _ in range(draw(st.integers(1, 6))):
        single = draw(st.booleans())
        slots = draw(st.permutations(range(SLOTS)))[: draw(st.integers(1, SLOTS))]
        call = []
        for slot in slots:
            start = lengths[slot] if draw(st.integers(0, 3)) else draw(st.integers(0, lengths[slot]))
            most = CONTEXT - start
            if most == 0:
                start, most = 0, CONTEXT
            size = 1 if single else draw(st.integers(1, most))
            ids = draw(st.lists(st.integers(0, 99), min_size=size, max_size=size))
            call.append(Segment(slot, start, ids, draw(st.sampled_from(["last", "all", "none"]))))
            lengths[slot] = start + size
        calls.append(call)
        for _ in range(draw(st.integers(0, 5)) if single else 0):
            if max(lengths[slot] for slot in slots) == CONTEXT:
                break
            calls.append([Segment(one.slot, lengths[one.slot], [draw(st.integers(0, 99))], one.want) for one in call])
            for slot in slots:
                lengths[slot] += 1
    return calls


@pytest.mark.parametrize(
    "profiles", [tactics(), tactics((9,)), tactics((2, 9), usual=1), tactics(tokens=40, batch=9, rows=40)]
)
@given(calls=work())
def test_every_sequence_is_what_its_segments_made_it(profiles, calls):
    caches = Caches(profiles)
    for call in calls:
        rows = caches.run(call)
        for segment, got in zip(call, rows):
            assert got == expected(caches, segment)


def test_a_step_that_goes_on_is_planned_like_any_other():
    both = [Planner(tactics(), CONTEXT, SLOTS) for _ in range(2)]
    for planner in both:
        list(planner.plan([Segment(slot, 0, [7] * (3 + slot)) for slot in range(5)]))
    taken = 0
    for step in range(30):
        # slot 3 idles; at step 9 slot 1 leaves
        slots = (4, 0, 1) if step < 9 else (4, 0)
        segments = [Segment(slot, 3 + slot + step, [step + slot]) for slot in slots]
        steady = both[0].steady(segments, 100)
        (one,) = [steady] if steady is not None else list(both[0].plan(segments))
        (other,) = both[1].plan(segments)
        taken += steady is not None
        for name in ("profile", "base", "seen"):
            assert getattr(one, name) == getattr(other, name), (step, name)
        for name in ("tokens", "starts", "rows", "owners"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name), (step, name))
    assert taken >= 20, "planned at length only at first, when a sequence leaves, and when more positions are seen"


@pytest.mark.parametrize(
    "other",
    [
        Segment(0, 11, [1]),
        Segment(1, 10, [1]),
        Segment(0, 10, [1, 1]),
        Segment(0, 10, [1], "none"),
        Segment(0, 10, [100]),
    ],
)
def test_another_step_does_not_go_on(other):
    planner = Planner(tactics(), CONTEXT, SLOTS)
    list(planner.plan([Segment(0, 8, [1])]))
    assert planner.steady([Segment(0, 9, [1])], 100) is not None
    assert planner.steady([other], 100) is None
    assert planner.steady([Segment(0, 10, [1]), Segment(1, 0, [1])], 100) is None
    assert planner.steady([Segment(0, 10, [1])], 100) is not None
    planner.release(0)
    assert planner.steady([Segment(0, 11, [1])], 100) is None


def steps(caches: Caches, *slots: int) -> list:
    segments = [Segment(slot, len(caches.due[slot]), [1]) for slot in slots]
    return list(caches.planner.plan(segments))


def test_a_step_takes_the_narrowest_profile_at_the_size_it_was_tuned_for():
    caches = Caches(tactics())
    for slots, base, batch, profile in (
        ((0,), 0, 1, 1),
        ((5,), 5, 1, 1),
        ((0, 1), 0, 4, 2),
        ((2, 3), 0, 4, 2),
        ((6, 7), 5, 4, 2),
        ((1, 4), 1, 4, 2),
        ((0, 8), 0, 9, 3),
    ):
        (one,) = steps(caches, *slots)
        assert (one.base, len(one.starts), one.profile) == (base, batch, profile), slots
        assert np.flatnonzero(one.owners >= 0).tolist() == [slot - base for slot in slots]
        assert one.key == (profile, base, batch, one.seen)


def test_a_profile_tuned_for_one_runs_one():
    caches = Caches(tactics((2, 9), usual=1))
    assert [len(one.starts) for one in steps(caches, 0)] == [1]
    assert [len(one.starts) for one in steps(caches, 0, 1)] == [2]


def test_a_profile_may_take_more_sequences_than_there_are_slots():
    planner = Planner(tactics((2, 12), usual=2), CONTEXT, SLOTS)
    segments = [Segment(slot, 0, [1]) for slot in (2, 7)]
    (one,) = planner.plan(segments)
    assert (one.base, len(one.starts)) == (0, SLOTS)


def test_a_full_slot_is_not_written_to_until_it_is_released():
    caches = Caches(tactics())
    caches.run([Segment(1, 0, list(range(CONTEXT)))])
    # not widened over slot 1, and split around it
    assert [(one.base, len(one.starts)) for one in steps(caches, 2, 3)] == [(2, 2)]
    assert [(one.base, len(one.starts)) for one in steps(caches, 0, 2)] == [(0, 1), (2, 1)]
    caches.planner.release(1)
    assert [(one.base, len(one.starts)) for one in steps(caches, 0, 2)] == [(0, 4)]


def test_attention_walks_few_different_numbers_of_positions(monkeypatch):
    monkeypatch.setattr(passes, "_LEAST_SEEN", 256)
    found = [reach(end, 4000) for end in range(1, 4001)]
    assert sorted(set(found)) == [256, 384, 512, 768, 1024, 1536, 2048, 3072, 4000]
    assert all(end <= seen for end, seen in enumerate(found, 1))
    assert all(seen <= max(256, 1.5 * end) for end, seen in enumerate(found, 1))


def test_prompts_share_a_pass_when_they_are_neighbours_of_like_length():
    caches = Caches(tactics(tokens=40, batch=9, rows=40))

    def passes(*sizes: int) -> list[tuple[int, int, int]]:
        segments = [Segment(slot, 0, [1] * size) for slot, size in enumerate(sizes) if size]
        return [(one.base, *one.tokens.shape) for one in caches.planner.plan(segments)]

    assert passes(7, 8, 9) == [(0, 3, 9)]
    assert passes(30, 3, 30) == [(0, 1, 30), (1, 1, 3), (2, 1, 30)]
    assert passes(9, 0, 9) == [(0, 1, 9), (2, 1, 9)]
