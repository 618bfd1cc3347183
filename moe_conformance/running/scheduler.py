"""Which xdist worker runs what: a worker stays with its engine, whose process it has already started.

Groups are told from test ids: xdist's own groups, by marker, do nothing under pytest 9.2 (pytest-xdist#1386).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling


class OneEngineAWorker(LoadScopeScheduling):  # type: ignore[misc]
    """A unit of work is a check on one engine.

    Next comes one on the worker's engine, else on the engine with fewest workers.
    """

    def __init__(self, config: pytest.Config, log: Any, engines: list[str]) -> None:
        super().__init__(config, log)
        self.engines = sorted(engines, key=len, reverse=True)  # of two names that fit, the longer

    def _split_scope(self, nodeid: str) -> str:
        check, _, parameters = nodeid.partition("[")
        engine = next((name for name in self.engines if parameters.startswith(f"{name}-")), "")
        return f"{engine}@{check if engine else check.partition('::')[0]}"

    def _assign_work_unit(self, node: Any) -> None:
        last = {worker: _engine(list(units)[-1]) for worker, units in self.assigned_work.items() if units}
        workers = Counter(last.values())
        first = min(self.workqueue, key=lambda scope: (_engine(scope) != last.get(node), workers[_engine(scope)]))
        self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)

    def remove_node(self, node: Any) -> str | None:
        """The item that killed a worker.

        It is not run again; xdist would retry it on every worker that it may start.
        """
        workload = self.assigned_work.pop(node)
        left = [(unit, nodeid) for unit in workload.values() for nodeid, is_done in unit.items() if not is_done]
        if not left:
            return None
        unit, died_of = left[0]
        unit[died_of] = True
        self.workqueue.update({scope: unit for scope, unit in workload.items() if not all(unit.values())})
        for other in self.assigned_work:
            self._reschedule(other)
        return str(died_of)


def _engine(scope: str) -> str:
    return scope.partition("@")[0]
