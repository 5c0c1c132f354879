"""Lightning's launcher of a node's processes, which calls up those that stand by instead of starting others."""

from __future__ import annotations

import os

from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from nemo_kto.runtime import standby


class StandbyLauncher(_SubprocessScriptLauncher):
    """Starts the other processes as Lightning does, unless they have been started already; see `standby.py`."""

    def _call_children_scripts(self) -> None:
        environment = self.cluster_environment
        shared = {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(environment.node_rank()),
            "WORLD_SIZE": str(self.num_processes * self.num_nodes),
        }
        given = {rank: {**os.environ, **shared, "LOCAL_RANK": str(rank)} for rank in range(1, self.num_processes)}
        called = standby.call_up(given)
        if called is None:
            super()._call_children_scripts()
            return
        self._check_can_spawn_children()
        os.environ.update({**shared, "LOCAL_RANK": str(environment.local_rank())})
        self.procs = called
