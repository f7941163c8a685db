"""The model of machines, where the answer is known, and the corpus that it is given."""

import math

import numpy as np
import pytest

from pipeline.plan.expected import expect
from pipeline.plan.figures import Figures, load_figures
from pipeline.plan.ranges import total
from tests.benchmarks.cluster_model import Floats, Job, Limit, Machines, simulate, terms_s
from tests.benchmarks.item_times import multiples
from tests.benchmarks.scaling import (
    BANDWIDTH,
    READS,
    WRITES,
    Run,
    Stage,
    corpus_recipe,
    corpus_stages,
    run,
    stops_at,
)

COMMON = (WRITES, READS, BANDWIDTH)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def same(count: int, seconds: float) -> Floats:
    return np.full(count, seconds)


@pytest.mark.parametrize(("count", "slots"), [(1, 1), (4, 2), (7, 3), (200, 1)])
def test_equal_items_take_as_many_rounds_as_slots_make(count: int, slots: int) -> None:
    outcome = simulate(Job(same(100, 10)), Machines(count, slots), rng())
    assert outcome.finished_s == 10 * math.ceil(100 / (count * slots))
    assert (outcome.attempts, outcome.lost_s) == (100, 0)


def test_machines_are_paid_from_when_they_are_asked_for_until_they_are_idle() -> None:
    # One slot each, 120 s of start: three items on two machines.
    outcome = simulate(Job(same(3, 10)), Machines(2, 1, start_s=(120, 120)), rng())
    assert outcome.finished_s == 140
    assert outcome.machine_s == 140 + 130


def test_machines_come_twice_as_many_at_a_time() -> None:
    # The second comes after 60 s, the third after 60 log2(3) s: its third item is the last of all.
    # The other two have begun twelve and six by then, the fourth would come after 120 s.
    outcome = simulate(Job(same(21, 10)), Machines(4, 1, doubling_s=60), rng())
    assert outcome.finished_s == pytest.approx(60 * math.log2(3) + 30)


def test_the_longest_item_cannot_be_cut() -> None:
    outcome = simulate(Job(np.array([500.0, *same(100, 1)])), Machines(50, 4), rng())
    assert outcome.finished_s == 500


@pytest.mark.parametrize("rate_per_hour", [0.5, 2.0])
def test_preemptions_cost_what_theory_says(rate_per_hour: float) -> None:
    """An item of L seconds that starts over takes (1/r + D)(exp(rL) - 1), with starts of D."""
    length_s, start_s, rate_per_s = 1800.0, 300.0, rate_per_hour / 3600
    machines = Machines(1, 1, (start_s, start_s), preemptions_per_hour=rate_per_hour)
    source = rng()
    taken = [simulate(Job(same(1, length_s)), machines, source).finished_s for _ in range(4000)]
    expected = start_s + (1 / rate_per_s + start_s) * math.expm1(rate_per_s * length_s)
    error_s = float(np.std(taken)) / math.sqrt(len(taken))
    assert np.mean(taken) == pytest.approx(expected, abs=4 * error_s)


def test_lost_work_is_done_again_and_counted() -> None:
    machines = Machines(5, 4, (60, 600), preemptions_per_hour=3)
    outcome = simulate(Job(same(2000, 300)), machines, rng())
    preempted = outcome.attempts - 2000
    assert preempted > 0
    # Half an item is lost on average.
    assert outcome.lost_s / preempted == pytest.approx(150, rel=0.1)
    paid_slots_s = outcome.machine_s * machines.slots
    assert paid_slots_s > 2000 * 300 + outcome.lost_s


def test_a_limit_is_shared_by_all_machines() -> None:
    job = Job(same(1000, 1), {Limit("host", 5): same(1000, 2)})
    for count in (100, 1000):
        assert simulate(job, Machines(count, 1), rng()).finished_s == pytest.approx(400)
    # Where it does not bind, it changes nothing.
    assert simulate(job, Machines(1, 1), rng()).finished_s == 1000


def test_what_a_limit_has_not_given_while_nobody_asked_is_gone() -> None:
    job = Job(same(10, 1), {Limit("host", 5): same(10, 5)})
    outcome = simulate(job, Machines(10, 1, start_s=(100, 100)), rng())
    assert outcome.finished_s == pytest.approx(110)


def test_a_limit_that_doubles() -> None:
    limit = Limit("writes", 1000, doubling_s=1200)
    for time_s in (1.0, 1200.0, 7200.0):
        assert limit.time_s_of(limit.units_until(time_s)) == pytest.approx(time_s)
    # The mean rate of the first doubling is 1 / ln 2 of the first rate.
    assert limit.units_until(1200) == pytest.approx(1000 * 1200 / math.log(2))
    job = Job(same(10_000, 0.001), {limit: same(10_000, 300)})
    assert simulate(job, Machines(100, 10), rng()).finished_s == pytest.approx(
        limit.time_s_of(3e6), rel=1e-3
    )


def test_no_run_is_faster_than_its_terms_and_more_machines_are_never_slower() -> None:
    seconds = rng().lognormal(3, 0.7, 5000)
    job = Job(seconds, {Limit("writes", 50, 1200): same(5000, 4), Limit("host", 9): same(5000, 1)})
    last_s = math.inf
    for count in (1, 4, 16, 64, 256):
        machines = Machines(count, 4)
        outcome = simulate(job, machines, rng())
        terms = terms_s(job, machines)
        assert max(terms.values()) <= outcome.finished_s <= last_s
        assert outcome.finished_s <= sum(terms.values()) + seconds.max()
        last_s = outcome.finished_s
    assert max(terms, key=terms.__getitem__) == "host"


def test_machines_of_unequal_speed_share_the_work_by_their_speeds() -> None:
    machines = Machines(100, 4, speed_sigma=0.3)
    outcome = simulate(Job(same(40_000, 10)), machines, rng())
    # The mean of 1 / slowness is exp(sigma^2 / 2) above one.
    assert outcome.finished_s == pytest.approx(1000 / math.exp(0.3**2 / 2), rel=0.06)


@pytest.fixture(scope="module")
def figures() -> Figures:
    return load_figures()


@pytest.fixture(scope="module")
def corpus(figures: Figures) -> list[Stage]:
    return corpus_stages(figures, rng())


def test_it_is_the_corpus_of_i1(figures: Figures) -> None:
    expected = expect(corpus_recipe(by_model=True), figures, {}, is_fresh=True)
    assert round(total(dataset.kept for dataset in expected.values()).high / 1e6, 1) == 162.9


def test_the_items_are_those_of_the_plan(corpus: list[Stage]) -> None:
    assert [stage.name for stage in corpus] == [
        *("ingest", "embed", "dedup", "caption", "mix", "caption by model")
    ]
    for stage in corpus:
        work, item_s = stage.plan.work, stage.job.item_s
        assert item_s.min() > 0
        if stage.name != "dedup":  # of which the items that take time are not those of shards
            assert work.items.low * 0.99 <= len(item_s) <= work.items.high * 1.01
        of_slots = work.gpu_s * stage.machines.slots if work.gpu_s.high else work.worker_s
        assert of_slots.low < item_s.sum() < of_slots.high
        assert work.class_a.low * 0.99 <= stage.job.uses[WRITES].sum() <= work.class_a.high * 1.01
    hosts = {limit.name for limit in corpus[0].job.uses} - {limit.name for limit in COMMON}
    assert hosts == {"host of yfcc", "host of redcaps", "host of megalith10m"}


def test_the_parts_that_are_not_shared_bound_a_stage(corpus: list[Stage], figures: Figures) -> None:
    dedup = corpus[2]
    few, many = run(dedup, 20, figures), run(dedup, 500, figures)
    unshared_h = (dedup.starts_s + dedup.alone_s + dedup.driver_s) / 3600
    assert unshared_h * 0.95 < many.hours < few.hours
    assert many.hours < unshared_h * 1.1
    assert many.binding == "alone"
    assert many.usd > few.usd


def test_the_same_seed_gives_the_same_hours(corpus: list[Stage], figures: Figures) -> None:
    mix = corpus[4]
    again = corpus_stages(figures, rng())[4]
    assert run(mix, 100, figures) == run(again, 100, figures)


def test_scaling_stops_where_more_machines_save_less_than_half_of_their_share() -> None:
    def of(count: int, hours: float) -> Run:
        return Run("s", count, hours, 0, {"work": hours}, 0)

    ideal = [of(10, 8), of(20, 4), of(40, 2)]
    assert stops_at(ideal) is ideal[-1]
    # From 20 to 40 machines 2 hours should be saved.
    assert stops_at([*ideal[:2], of(40, 2.9)]).count == 40
    assert stops_at([*ideal[:2], of(40, 3.1)]).count == 20


def test_items_are_compared_with_the_mean_of_their_dataset() -> None:
    slow, fast = [99.0, *([2.0, 6.0] * 15)], [99.0, *([0.1, 0.3] * 15)]
    found = multiples({("embed", "a"): slow, ("embed", "b"): fast, ("embed", "few"): [1.0] * 9})
    assert found == {"embed": pytest.approx([0.5, 0.5, 0.5, 1, 1.5, 1.5, 1.5])}
