"""Processes that are started again do not find the addresses of those that are dead."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import Store
from torch.distributed import TCPStore
from torch.distributed.rendezvous import rendezvous

from shardprep_trainer.processes.meeting import group_options, meeting_place


def meet(server: TCPStore, world_size: int, monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """Let so many processes meet, of which the last comes late; their stores, by rank."""
    method = group_options(0).init_method
    assert method is not None

    def come(rank: int) -> Store:
        time.sleep(0.2 * (rank == world_size - 1))
        store, *place = next(rendezvous(method, rank, world_size, timeout=timedelta(seconds=30)))
        assert place == [rank, world_size]
        found: Store = store
        return found

    # As torchrun tells its workers: the store is the launcher's, and outlives them.
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(come, range(world_size)))


def test_every_start_of_a_group_meets_in_a_store_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    before: list[Store] = []
    # One launcher keeps one store for all, and processes come and go.
    for world_size in (2, 2, 3, 1, 2):
        stores = meet(server, world_size, monkeypatch)
        stores[0].set("address", f"of this start, {len(before)}")
        for store in stores:
            assert store.get("address").decode() == f"of this start, {len(before)}"
        assert not any(store.get("address") == stores[0].get("address") for store in before)
        before.append(stores[0])


@pytest.mark.parametrize(("hang", "least"), [(0, 1800), (1800, 3600), (1e12, 1e6)])
def test_the_group_s_own_time_out_comes_after_the_watchdog_s(hang: float, least: float) -> None:
    timeout = group_options(hang).timeout
    assert timeout is not None
    assert least <= timeout.total_seconds() < 2**31 / 1000


def test_a_process_on_its_own_has_no_meeting_place() -> None:
    assert meeting_place() is None
