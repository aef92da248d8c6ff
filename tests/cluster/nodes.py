"""A real Ray cluster on this machine: two raylets of one core each, the second of which sees no data but its own."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small
from processes import Process, below, processes

HERE = Path(__file__).parent
ABSENT = "Ray is not installed; pip install 'backdoorbench-mcl[ray]'"
QUICK = {  # a raylet that died is noticed in two seconds instead of fifteen
    "health_check_initial_delay_ms": 1000, "health_check_period_ms": 500, "health_check_failure_threshold": 3,
}  # fmt: skip
STORE = 78 << 20  # bytes of a node's object store; Ray wants 75 MB at least


@dataclass
class Two:
    """The cluster. env: what its nodes, and a driver beside them, find in their environment."""

    cluster: Any
    env: dict[str, str]
    cache: Path
    second: Any = None

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add(self, cpus: int, *paths: Path, **env: str) -> Any:
        """A node whose Python finds `paths` first."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([*map(str, paths), self.env["PYTHONPATH"]]))
            for name, value in env.items():
                patch.setenv(name, value)
            return self.cluster.add_node(num_cpus=cpus, object_store_memory=STORE)

    def add_second(self) -> None:
        self.second = self.add(1, HERE / "blind", BBMCL_CACHE=str(self.cache / "second"))

    def raylet(self, node: Any) -> int:
        return int(node.all_processes["raylet"][0].process.pid)

    def jobs(self, *nodes: Any) -> list[Process]:
        """Jobs on some nodes, or on any: what the fork servers below their raylets have forked."""
        every = processes()
        raylets = map(self.raylet, nodes or [self.cluster.head_node, *self.cluster.worker_nodes])
        servers = [one for raylet in raylets for one in below(raylet, every) if "forkserver" in one.command]
        return [one for one in every if one.parent in {server.pid for server in servers}]

    def kill_second(self) -> list[Process]:
        """SIGKILL to its raylet alone. Returns what it had started."""
        pid = self.raylet(self.second)
        found = below(pid)
        os.kill(pid, signal.SIGKILL)
        self.cluster.worker_nodes.discard(self.second)
        return found


@contextlib.contextmanager
def cluster_of_two(toy_env: dict[str, str], folder: Path) -> Iterator[Two]:
    """Starts the cluster, ends it. folder: for the caches of its nodes."""
    utils = pytest.importorskip("ray.cluster_utils", reason=ABSENT)
    with pytest.MonkeyPatch.context() as patch:
        small.install_toy(patch, toy_env["BBMCL_CACHE"])
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "_system_config": QUICK}
        cluster = utils.Cluster(initialize_head=True, head_node_args=head)
        both = Two(cluster, dict(toy_env), folder)
        try:
            both.add_second()
            yield both
        finally:
            cluster.shutdown()
