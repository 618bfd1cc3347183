"""The engine's own process: `python -m moe_conformance.running.host NAME PATH` answers JSON requests, one a line.

Requests come on stdin; answers leave through the original stdout, which nothing else may write to: whatever an
engine prints goes to stderr. The first answer says who the engine is, or why it cannot start.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from typing import Any

from moe_conformance.errors import MoEConformanceError, Unavailable
from moe_conformance.running.discovery import Target, extend_path


def main() -> None:
    faulthandler.enable()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    extend_path()
    try:
        from moe_conformance.judging.judge import Judge

        judge = Judge(Target(*sys.argv[1:3]))
    except (MoEConformanceError, ImportError) as error:
        answer(unavailable=str(error) or type(error).__name__, is_missing=isinstance(error, Unavailable))
        return
    except Exception:
        answer(unavailable=traceback.format_exc(limit=-6), is_missing=False)
        return
    info = judge.engine.info
    answer(name=info.name, version=info.version, device=info.device)

    from moe_conformance.catalogue.case import catalogue

    for line in sys.stdin:
        request = json.loads(line)
        outcome = judge.run(request["module"], request["function"], catalogue()[request["case"]])
        answer(verdict=outcome.verdict, message=outcome.message, facts=outcome.facts)


if __name__ == "__main__":
    main()
