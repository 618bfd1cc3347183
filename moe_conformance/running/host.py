"""The engine's process. `python -m moe_conformance.running.host NAME PATH SEED READ WRITE` answers a question a line.

READ and WRITE are descriptors that nothing else knows: see child.py. The first line out says who the engine is, or why
it cannot start.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import sys
import traceback
from dataclasses import replace

from moe_conformance.errors import MoEConformanceError, Unavailable
from moe_conformance.judging.plain import plain
from moe_conformance.judging.verdict import Outcome, Verdict
from moe_conformance.running.child import follow_parent
from moe_conformance.running.discovery import Target, extend_path
from moe_conformance.running.messages import Answer, Check, Hello, Message, Probe, Unstartable, decode, encode


def main() -> None:
    faulthandler.enable()
    follow_parent()
    gc.disable()  # while modules are imported: garbage collection would take a tenth of that time and find nothing
    name, path, seed, read, write = sys.argv[1:6]
    for descriptor in (int(read), int(write)):
        os.set_inheritable(descriptor, False)  # what an engine starts must not hold them open
    questions, answers = os.fdopen(int(read), encoding="utf-8"), os.fdopen(int(write), "w", encoding="utf-8")

    def say(message: Message) -> None:
        answers.write(encode(message))
        answers.flush()

    extend_path()
    try:
        from moe_conformance.judging.judge import Judge

        judge = Judge(Target(name, path), int(seed))
    except (MoEConformanceError, ImportError) as error:
        say(Unstartable(str(error) or type(error).__name__, isinstance(error, Unavailable)))
        return
    except Exception:
        say(Unstartable(traceback.format_exc(limit=-6), is_missing=False))
        return
    gc.enable()
    info = judge.engine.info
    say(Hello(info.name, info.version, info.device))

    from moe_conformance.catalogue.case import catalogue

    for line in questions:
        match decode(line):
            case Probe(number, stage):
                outcome = judge.probe(stage)
            case Check(number, module, function, case):
                outcome = judge.run(module, function, catalogue()[case])
            case other:
                raise ValueError(f"got {other}, want a question")
        outcome = replace(outcome, message=plain(outcome.message))
        try:
            say(Answer(number, outcome))
        except TypeError as error:
            said = f"the check's facts: got {type(outcome.facts).__name__}, want JSON data: {error}"
            say(Answer(number, Outcome(Verdict.ERROR, said)))


if __name__ == "__main__":
    main()
