"""How a judge tells an engine's faults from its adapter's, and what an adapter may declare."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any

import fake_engines
import pytest
import torch

from moe_conformance.catalogue.case import Case, catalogue
from moe_conformance.engine import (
    AlignInputs,
    Engine,
    EngineInfo,
    Limits,
    LogitsSpec,
    RouterSpec,
    RoutingSpec,
    Unsupported,
    called_by_engine,
)
from moe_conformance.errors import Absent, Nonconformance, UsageError
from moe_conformance.judging.judge import Judge
from moe_conformance.judging.probe import ProbeFailure, probe
from moe_conformance.judging.verdict import Refusal, Verdict
from moe_conformance.oracle import value
from moe_conformance.running.discovery import Target


def judge_of(name: str) -> Judge:
    return Judge(Target(name, f"fake_engines:{name}"))


def align_in_blocks_of(block: int) -> Any:
    return lambda engine, case: engine.align(AlignInputs(torch.zeros((1, 1), dtype=torch.int32), 4, block))


CASE = Case("a-case", stage="align", clause="align.whole-blocks")


@pytest.mark.parametrize(
    ("function", "verdict", "words"),
    [
        (fake_engines.marked, Verdict.FAIL, "KeyError: 'unknown'"),
        (fake_engines.not_marked, Verdict.ERROR, "KeyError: 'unknown'"),
        (fake_engines.marked_of_old_signature, Verdict.ERROR, "takes 0 positional arguments but 1 was given"),
        (fake_engines.marked_that_mistypes, Verdict.FAIL, "can only concatenate str"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_raises_in_a_marked_function_is_the_engines_but_for_its_signature(
    function: Any, verdict: Verdict, words: str
) -> None:
    """Marked: the engine chose the key. Not marked: the adapter. Of an old signature: the adapter, though no frame of
    it is in the traceback. A TypeError in the body is like any other error there."""
    block = next(block for block, callback in fake_engines.CALLBACKS.items() if callback is function)
    outcome = judge_of("CallsBack").judge(align_in_blocks_of(block), CASE)
    assert (outcome.verdict, words in outcome.message) == (verdict, True), outcome.message


class _OfProtocol1(Engine):
    info = EngineInfo("old", "1", "cpu")

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {"align": frozenset()}

    def align(self, inputs: Any) -> Any:
        return inputs.spec.method if hasattr(inputs, "spec") else called_by_engine(partial(len, "x"))


def test_what_breaks_in_what_is_here_for_all_is_its_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter that reads a field of an older protocol, or marks what cannot be marked; an oracle that is wrong."""
    judge = Judge(Target("old", f"{__name__}:_OfProtocol1"))
    for inputs in (SimpleNamespace(spec=RouterSpec(LogitsSpec(), RoutingSpec(1), 4, 8, torch.float32)), None):
        outcome = judge.judge(lambda engine, case, inputs=inputs: engine.align(inputs), CASE)
        assert outcome.verdict is Verdict.ERROR, outcome.message
    reference = Judge(Target("reference", "moe_conformance.engines.reference:Reference"))
    source = compile("def project(self, *a): raise ValueError('planted')", value.__file__, "exec")
    there: dict[str, Any] = {}
    exec(source, there)
    monkeypatch.setattr(value.Value, "project", there["project"])
    case = catalogue()["experts-tiny-silu"]
    module, check = "moe_conformance.suites.experts.test_activation", "test_experts_compute_their_function"
    outcome = reference.run(module, check, case)
    assert outcome.verdict is Verdict.ERROR and "ValueError: planted" in outcome.message


def test_a_mark_sits_on_the_function_itself() -> None:
    with pytest.raises(TypeError, match="got staticmethod, want a function; below @staticmethod"):
        called_by_engine(staticmethod(len))  # type: ignore[arg-type]

    @called_by_engine
    @torch.no_grad()
    def hook() -> None: ...

    from moe_conformance.protocol.engine import is_called_by_engine

    assert is_called_by_engine(hook.__wrapped__.__code__)  # type: ignore[attr-defined]
    assert not is_called_by_engine(hook.__code__)  # torch's own, which every function below a no_grad shares


@pytest.mark.parametrize(
    ("attribute", "value", "words"),
    [
        ("protocol", 1, "protocol: got 1, want 2; docs/migrating.md says what changed"),
        ("capabilities", {"lair": frozenset()}, "got stage 'lair', want one of describe, "),
        ("capabilities", {"lair": frozenset()}, "did you mean 'layer'?"),
        ("capabilities", {"layer": "softmax"}, "capabilities['layer']: got 'softmax', want a set of words"),
        ("capabilities", {"layer": {"softmx"}}, "layer: got feature 'softmx', want one of "),
        ("capabilities", {"block": {"mixtrl"}}, "did you mean 'mixtral'?"),
        ("capabilities", {"layer": {"softmax_topk"}}, "declare 'softmax' and 'not_renormalized' instead"),
        ("capabilities", {"capture_store": {"bounds"}}, "take it out: every engine must do it"),
        ("capabilities", {"route": frozenset()}, "got 'route', which the adapter has no method for"),
        ("absent", {"layer": {"lora"}}, "want a mapping of stage to a mapping of feature to reason"),
        ("absent", {"layer": {"softmx": "none"}}, "layer: got feature 'softmx', want one of "),
        ("absent", {"layer": {"softmax": ""}}, "absent['layer']['softmax']: got '', want the reason"),
        ("absent", {"layer": {"padded_hidden": "none"}}, "got 'padded_hidden', which capabilities() declares"),
        ("limits", {"layer": 4096}, "limits['layer']: got int, want Limits"),
        ("limits", {"lair": Limits()}, "limits: got stage 'lair', want one of describe, "),
        ("limits", {"layer": Limits(dtypes="float32")}, "dtypes: got 'float32', want a set out of float64, "),
        ("limits", {"layer": Limits(dtypes=frozenset({"fp32"}))}, "want a set out of float64, float32, "),
        ("limits", {"layer": Limits(tokens=0)}, "tokens: got 0, want a number from 1 up"),
        ("limits", {"lair": Limits()}, "did you mean 'layer'?"),
        ("limits", {"layer": Limits(multiples={"K": 2})}, "multiples: got 'K': 2, want H or D or F"),
        ("limits", {"block": Limits(experts=8)}, "experts: got a limit of what block is not told, want one of dtype"),
        ("limits", {"block": Limits(multiples={"F": 8})}, "F: got a limit of what block is not told"),
    ],
)
def test_a_wrong_declaration_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, attribute: str, value: Any, words: str
) -> None:
    said = value if attribute == "protocol" else lambda self: value
    monkeypatch.setattr(fake_engines.AlwaysWrong, attribute, said, raising=False)
    with pytest.raises(UsageError) as refused:
        judge_of("AlwaysWrong")
    assert words in str(refused.value)


def test_a_failed_probe_is_an_error_of_its_stage_alone() -> None:
    judge = judge_of("FailsItsProbe")
    assert judge.probe("layer").verdict is Verdict.ERROR
    assert "layer: got [1, 32], want a tensor [3, 32]" in judge.probe("layer").message
    assert judge.probe("route").verdict is Verdict.PASS


def test_a_stage_that_is_not_declared_must_refuse() -> None:
    said = judge_of("ClaimsTooLittle").probe("route")
    assert said.verdict is Verdict.ERROR and "declare the stage, so that it is judged" in said.message


def test_a_refusal_has_a_kind_and_the_engines_words() -> None:
    def refuses(engine: Any, case: Case) -> None:
        raise Unsupported("no kernel for sm_35")

    judge, plain = judge_of("CallsBack"), Case("a-layer", stage="layer", clause="layer.cut-before-add")
    mapped = Case("a-map", stage="align", clause="align.whole-blocks", recipe={"expert_map": True})
    said = [judge.judge(refuses, case) for case in (CASE, plain, mapped)]
    assert {outcome.verdict for outcome in said} == {Verdict.UNSUPPORTED}
    assert [outcome.refusal for outcome in said] == [Refusal.CALL, Refusal.STAGE, Refusal.FEATURE]
    assert said[0].message == "no kernel for sm_35"


def test_what_the_engine_has_nothing_of_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(engine: Any, case: Case) -> None:
        raise Absent("no model of this engine routes so")

    reason = "no model of this engine has experts on other ranks"
    monkeypatch.setattr(fake_engines.CallsBack, "absent", lambda self: {"align": {"expert_map": reason}}, raising=False)
    judge = judge_of("CallsBack")
    mapped, dropped = (
        Case(f"a-case-{n}", stage="align", clause="align.whole-blocks", recipe={key: True})
        for n, key in enumerate(("expert_map", "dropped"))
    )
    said = [judge.judge(refuses, case) for case in (CASE, mapped, dropped)]
    assert [(outcome.verdict, outcome.refusal) for outcome in said] == [
        (Verdict.ABSENT, Refusal.CALL),
        (Verdict.ABSENT, Refusal.FEATURE),
        (Verdict.UNSUPPORTED, Refusal.FEATURE),
    ]
    assert said[0].message == "no model of this engine routes so"
    assert said[1].message == f"align without expert_map: {reason}"
    assert not any(outcome.verdict.was_judged or outcome.verdict.is_bad for outcome in said)


def test_limits_hold_for_calls_and_can_be_asked_where_a_check_goes_around_them() -> None:
    engine = judge_of("CallsBack").engine
    inputs = AlignInputs(torch.zeros((1, 1), dtype=torch.int32), 4, 1)
    engine.within("align", inputs)
    engine.limits = {"align": Limits(pairs=0)}
    for call in (engine.align, partial(engine.within, "align")):
        with pytest.raises(Unsupported, match="align: limits: pairs: got 1, want at most 0"):
            call(inputs)


class Recorder(Engine):
    """Answers any call as the reference would, and keeps the inputs."""

    info = EngineInfo("recorder", "1")

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def route(self, inputs: Any) -> Any:
        self.seen.append(inputs)
        ids = torch.zeros((len(inputs.logits), inputs.routing.top_k), dtype=torch.int64)
        return ids, ids.float()

    def experts(self, inputs: Any) -> Any:
        self.seen.append(inputs)
        return torch.zeros_like(inputs.x)

    layer = experts


@pytest.mark.parametrize(
    ("declared", "want"),
    [
        ({"softmax", "renormalize", "sigmoid"}, {"score": "softmax", "renormalize": "sum", "select_on": "scores"}),
        ({"sigmoid", "not_renormalized", "groups"}, {"score": "sigmoid", "renormalize": "no"}),
        ({"softmax", "score_of_chosen", "not_renormalized"}, {"score": "softmax", "renormalize": "no"}),
        ({"sparsemixer"}, {"selector": "sparsemixer"}),
        ({"product_keys", "renormalize"}, {"selector": "product_keys", "renormalize": "sum"}),
        ({"table", "sqrt_softplus", "renormalize"}, {"selector": "topk", "score": "sqrt_softplus"}),
    ],
)
@pytest.mark.parametrize("stage", ["route", "layer"])
def test_a_probe_asks_for_what_is_declared(stage: str, declared: set[str], want: Mapping[str, str]) -> None:
    engine = Recorder()
    probe(engine, stage, declared)
    (inputs,) = engine.seen
    routing = inputs.routing if stage == "route" else inputs.spec.routing
    assert {name: getattr(routing, name) for name in want} == want


def test_a_probe_stays_within_the_limits() -> None:
    limits = Limits(dtypes=frozenset({"bfloat16"}), top_k=1, multiples={"D": 24, "H": 36, "F": 64})
    engine = Recorder()
    for stage, declared in (("route", {"softmax", "renormalize"}), ("experts", set()), ("layer", {"sparsemixer"})):
        probe(engine, stage, declared, limits)
    route, experts, layer = engine.seen
    assert (route.logits.dtype, route.routing.top_k) == (torch.bfloat16, 1)
    assert (experts.x.shape, experts.mlp.width, experts.ids.shape) == ((3, 72), 64, (3, 1))
    assert (layer.spec.hidden_size, layer.x.dtype) == (72, torch.bfloat16)


def test_the_reference_passes_its_probe_in_every_stage() -> None:
    judge = Judge(Target("reference", "moe_conformance.engines.reference:Reference"))
    said = {stage: judge.probe(stage) for stage in judge.capabilities}
    assert {stage: outcome.message for stage, outcome in said.items() if outcome.verdict is not Verdict.PASS} == {}


def test_a_probe_looks_at_form() -> None:
    class OneColumn(Recorder):
        def route(self, inputs: Any) -> Any:
            ids, weights = super().route(inputs)
            return ids[:, :1], weights

    with pytest.raises(ProbeFailure, match=r"route: got ids torch.int64 \[3, 1\] and weights \[3, 2\]"):
        probe(OneColumn(), "route", {"softmax", "renormalize"})


LAYERS = ("moe_conformance.suites.layer.test_shape_mismatch", "test_padding_never_reaches_the_output")


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("WritesIntoInputs", "x: the engine wrote into its input"),
        ("WritesIntoWeights", "tensors['experts.w2']: the engine wrote into its input"),
    ],
)
def test_an_input_written_to_is_named(engine: str, words: str) -> None:
    judge = judge_of(engine)
    outcome = judge.run(*LAYERS, catalogue()["layer-tiny-padded-hidden"])
    assert (outcome.verdict, words in outcome.message) == (Verdict.FAIL, True), outcome
    assert isinstance(judge.raised, Nonconformance)


def test_an_input_written_to_in_the_probe_is_an_error_of_the_stage() -> None:
    said = judge_of("WritesIntoInputs").probe("layer")
    assert said.verdict is Verdict.ERROR and "x: the engine wrote into its input" in said.message


def test_an_adapter_that_raises_is_an_error() -> None:
    outcome = judge_of("AdapterBroken").run(*LAYERS, catalogue()["layer-tiny-padded-hidden"])
    assert (outcome.verdict, "a misspelt attribute" in outcome.message) == (Verdict.ERROR, True), outcome


@pytest.mark.parametrize(
    ("ran", "words"),
    [
        (lambda: "cpu_fused_moe", "cpu_fused_moe"),
        (lambda: "", ""),
        (lambda: "x" * 10**6, "x" * 200),
        (lambda: 1 // 0, "ran() raised ZeroDivisionError"),
    ],
)
def test_what_ran_is_said_and_changes_no_verdict(ran: Any, words: str) -> None:
    judge = judge_of("CallsBack")
    judge.engine.raw.ran = ran
    passed = judge.judge(lambda engine, case: None, CASE)
    assert (passed.verdict, passed.message) == (Verdict.PASS, words)

    def wrong(engine: Engine, case: Case) -> None:
        raise Nonconformance("got 1, want 2")

    failed = judge.judge(wrong, CASE)
    assert failed.verdict is Verdict.FAIL and failed.message.endswith(f"[{words}]" if words else "want 2")


class SaysWhatRan(Engine):
    name = "says-what-ran"
    info = EngineInfo(name, "1")
    _ran = "a kernel of the case before"

    def capabilities(self) -> Mapping[str, frozenset[str]]:
        return {"align": frozenset()}

    def align(self, inputs: AlignInputs) -> Any:
        self._ran = "grouped kernel"
        return inputs.ids[0], inputs.ids[0], 0

    def ran(self) -> str:
        ran, self._ran = self._ran, ""
        return ran


def test_a_result_names_what_ran_for_it_alone() -> None:
    judge = Judge(Target("says-what-ran", "test_judge:SaysWhatRan"))
    assert judge.judge(align_in_blocks_of(1), CASE).message == "grouped kernel"
    assert judge.judge(lambda engine, case: None, CASE).message == ""

    def fails(engine: Any, case: Case) -> None:
        align_in_blocks_of(1)(engine, case)
        raise Nonconformance("got 1, want 2")

    assert judge.judge(fails, CASE).message == "got 1, want 2 [grouped kernel]"
