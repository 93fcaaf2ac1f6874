"""Fairness of the queue: the shares of tenants, and the order that it announces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tasks.serving.queue import FairQueue

ARRIVALS = st.lists(
    st.tuples(st.sampled_from(["ann", "ben", "carl"]), st.integers(1, 400), st.booleans()), min_size=1, max_size=60
)


def drain(queue: FairQueue) -> list[str]:
    order = []
    while heads := queue.heads():
        assert queue.pop(heads[0])
        order.append(heads[0])
    return order


def test_a_tenant_with_many_jobs_does_not_delay_one_job_of_another_behind_them() -> None:
    queue = FairQueue()
    for index in range(50):
        queue.push(f"ann-{index}", "ann", 20)
    assert queue.pop("ann-0")
    queue.push("ben", "ben", 20)
    assert queue.position("ben") == 1
    assert drain(queue)[0] == "ben"


def test_tenants_are_served_equal_steps_not_equal_jobs() -> None:
    queue = FairQueue()
    for index in range(10):
        queue.push(f"ann-{index}", "ann", 100)
    for index in range(100):
        queue.push(f"ben-{index}", "ben", 10)
    order = drain(queue)
    first = order[:55]
    assert sum(job.startswith("ann") for job in first) * 100 == sum(job.startswith("ben") for job in first) * 10 == 500


def test_a_tenant_that_sends_one_large_job_at_a_time_gets_no_more_than_its_share() -> None:
    queue = FairQueue()
    for index in range(200):
        queue.push(f"ben-{index}", "ben", 10)
    served = {"ann": 0, "ben": 0}
    for round_ in range(60):
        if not queue.count("ann"):  # its queue is empty in between, which resets it in deficit round robin
            queue.push(f"ann-{round_}", "ann", 200)
        head = queue.heads()[0]
        queue.pop(head)
        served[head.split("-")[0]] += 200 if head.startswith("ann") else 10
    assert abs(served["ann"] - served["ben"]) <= 200


@given(ARRIVALS)
def test_no_tenant_with_waiting_jobs_falls_behind_another_by_more_than_the_largest_job(
    arrivals: list[tuple[str, int, bool]],
) -> None:
    queue, costs = FairQueue(), {}
    for index, (tenant, cost, _) in enumerate(arrivals):
        queue.push(str(index), tenant, cost)
        costs[str(index)] = (tenant, cost)
    served = dict.fromkeys({tenant for tenant, _, _ in arrivals}, 0)
    most = max(cost for _, cost, _ in arrivals)
    while heads := queue.heads():
        waiting = {costs[head][0] for head in heads}
        least = min(served[tenant] for tenant in waiting)
        tenant, cost = costs[heads[0]]
        assert served[tenant] - least <= most
        queue.pop(heads[0])
        served[tenant] += cost


@given(ARRIVALS)
def test_positions_are_the_order_in_which_jobs_are_drawn(arrivals: list[tuple[str, int, bool]]) -> None:
    queue = FairQueue()
    for index, (tenant, cost, _) in enumerate(arrivals):
        queue.push(str(index), tenant, cost)
    for index, (_, _, canceled) in enumerate(arrivals):
        if canceled:
            queue.remove(str(index))
    waiting = [str(index) for index, (_, _, canceled) in enumerate(arrivals) if not canceled]
    announced = sorted(waiting, key=queue.position)
    assert len(queue) == len(waiting)
    assert drain(queue) == announced
    assert queue.position("0") == 0


def test_a_canceled_job_costs_its_tenant_nothing() -> None:
    queue = FairQueue()
    queue.push("large", "ann", 1000)
    queue.push("small", "ann", 10)
    queue.push("ben-1", "ben", 10)
    queue.push("ben-2", "ben", 10)
    queue.remove("large")
    assert drain(queue)[:2] == ["small", "ben-1"]


def test_a_job_that_is_not_the_first_of_its_tenant_is_not_drawn_before_it() -> None:
    queue = FairQueue()
    queue.push("first", "ann", 1)
    queue.push("second", "ann", 1)
    assert not queue.pop("second")
    assert drain(queue) == ["first", "second"]


def test_what_a_tenant_used_is_forgotten_when_nobody_waits() -> None:
    queue = FairQueue()
    queue.push("ann-1", "ann", 1000)
    drain(queue)
    queue.settle()
    queue.push("ann-2", "ann", 10)
    queue.push("ben-1", "ben", 10)
    assert drain(queue) == ["ann-2", "ben-1"]
