"""Processes that are started again do not find the addresses of those that are dead."""

from __future__ import annotations

import socket

import pytest
from torch.distributed.rendezvous import rendezvous

from trainer.meeting import group_options, meeting_place


def test_every_start_of_a_group_meets_in_a_store_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in place.items():
        monkeypatch.setenv(name, str(value))
    method = group_options(0).init_method
    assert method is not None
    found = []
    for attempt in ("0", "1", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        store, rank, world_size = next(rendezvous(method))
        assert (rank, world_size) == (0, 1)
        found.append(store)
    # One launcher keeps one store for all.
    first, second, same = found
    first.set("address", "of a process that died")
    assert first.check(["address"])
    assert not second.check(["address"])
    second.set("address", "of its successor")
    assert same.get("address") == b"of its successor"


@pytest.mark.parametrize(("hang", "least"), [(0, 1800), (1800, 3600), (1e12, 1e6)])
def test_the_group_s_own_time_out_comes_after_the_watchdog_s(hang: float, least: float) -> None:
    timeout = group_options(hang).timeout
    assert timeout is not None
    assert least <= timeout.total_seconds() < 2**31 / 1000


def test_a_process_on_its_own_has_no_meeting_place() -> None:
    assert meeting_place() is None
