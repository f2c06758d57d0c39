"""The budget of request bodies: never exceeded, always given back, and fair between parties."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.serving.bodies import FREE_SHARE, BodyBudget, HeldBody

MAX_BYTES = 1000


class Upload:
    """One request that uploads."""

    def __init__(self, budget: BodyBudget, party: str) -> None:
        self.refusals = 0
        self.kept = 0
        self.body: HeldBody = budget.hold(party, self._refused)

    def send(self, size: int) -> bool:
        if self.body.grow(size):
            self.kept += size
            return True
        return False

    def _refused(self) -> None:
        self.refusals += 1
        self.kept = 0


def test_a_body_that_fits_is_held_until_it_is_released() -> None:
    budget = BodyBudget(MAX_BYTES)
    upload = Upload(budget, "a")
    assert upload.send(600)
    assert upload.send(400)
    assert budget.held == MAX_BYTES
    upload.body.finish()
    assert budget.held == MAX_BYTES
    upload.body.release()
    upload.body.release()
    assert budget.held == 0
    assert not upload.send(1)
    assert upload.refusals == 0


def test_the_peer_with_most_unfinished_bytes_loses_what_it_began_first() -> None:
    budget = BodyBudget(MAX_BYTES)
    hoarding = [Upload(budget, "hoarder") for _ in range(9)]
    for upload in hoarding:
        assert upload.send(100)
    modest = Upload(budget, "modest")
    assert modest.send(300)
    assert [upload.refusals for upload in hoarding] == [1, 1, 0, 0, 0, 0, 0, 0, 0]
    assert modest.refusals == 0
    assert budget.held == MAX_BYTES


def test_whole_bodies_do_not_give_way_and_the_newcomer_does() -> None:
    budget = BodyBudget(MAX_BYTES)
    whole = Upload(budget, "a")
    assert whole.send(950)
    whole.body.finish()
    newcomer = Upload(budget, "b")
    assert not newcomer.send(100)
    assert (whole.refusals, newcomer.refusals) == (0, 1)
    assert budget.held == 950


def test_a_party_with_many_whole_bodies_leaves_room_for_others() -> None:
    """Nothing of hers gives way any more; so she is refused the next, and not Bob his first."""
    budget = BodyBudget(MAX_BYTES)
    alice = [Upload(budget, "alice") for _ in range(10)]
    for upload in alice:
        upload.send(100)
        upload.body.finish()
    assert [upload.refusals for upload in alice] == [0] * 7 + [1] * 3
    bob = [Upload(budget, "bob") for _ in range(2)]
    for upload in bob:
        assert upload.send(50)
        upload.body.finish()
    assert Upload(budget, "carol").send(100)


def test_who_holds_most_gives_way_though_most_of_it_is_whole() -> None:
    budget = BodyBudget(MAX_BYTES)
    whole, half, other = Upload(budget, "a"), Upload(budget, "a"), Upload(budget, "b")
    assert whole.send(600)
    whole.body.finish()
    assert half.send(50)
    assert other.send(300)
    assert other.send(60)
    assert (half.refusals, other.refusals) == (1, 0)


def test_a_small_body_of_another_peer_survives_a_large_newcomer() -> None:
    budget = BodyBudget(MAX_BYTES)
    small, large = Upload(budget, "a"), Upload(budget, "b")
    assert small.send(100)
    assert large.send(900)
    assert not large.send(100)
    assert (small.refusals, large.refusals) == (0, 1)
    assert small.send(100)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["send", "send", "send", "finish", "release"]),
        st.integers(0, 11),
        st.integers(0, 400),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_what_is_kept_is_what_is_counted_and_never_too_much(
    steps: list[tuple[str, int, int]],
) -> None:
    budget = BodyBudget(MAX_BYTES)
    uploads = [Upload(budget, "abc"[number % 3]) for number in range(12)]
    for what, number, size in steps:
        upload = uploads[number]
        if what == "send":
            upload.send(size)
        elif what == "finish":
            upload.body.finish()
        else:
            upload.body.release()
            upload.kept = 0
        assert sum(upload.kept for upload in uploads) == budget.held <= MAX_BYTES
        assert all(upload.refusals <= 1 for upload in uploads)
        for party in "abc":
            kept = [upload.kept for upload in uploads if upload.body.party == party]
            most = max(kept)
            assert sum(kept) <= max(most, MAX_BYTES * FREE_SHARE / (FREE_SHARE + 1))
    for upload in uploads:
        upload.body.release()
    assert budget.held == 0
    assert not budget._parties
