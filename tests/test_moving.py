"""Moving inputs to a device: every tensor at any depth, its strides, and nothing else."""

from __future__ import annotations

import torch

from moe_conformance.engine import ExpertsInputs, MLPSpec, RouteInputs, Routing, RoutingSpec, ShardInputs
from moe_conformance.protocol.moving import to_device


def inputs() -> ShardInputs:
    tensors = {"experts.w13": torch.ones(2, 4, 3), "experts.w2": torch.ones(2, 3, 2)}
    whole = ExpertsInputs(torch.ones(1, 3), MLPSpec(2), tensors, torch.tensor([[0]]), torch.ones(1, 1))
    return ShardInputs(whole, torch.tensor([0, 1]))


def test_tensors_at_any_depth_move_and_all_else_stays() -> None:
    moved = to_device(inputs(), "meta")
    for tensor in (*moved.whole.tensors.values(), moved.whole.x, moved.whole.ids, moved.expert_map):
        assert tensor.device.type == "meta"
    assert moved.whole.mlp == MLPSpec(2) and moved.shared is None and moved.ep_size == 1


def test_what_is_there_already_is_handed_back_itself() -> None:
    there = inputs()
    assert to_device(there, "cpu") is there


def test_named_tuples_tuples_and_lists_keep_their_types() -> None:
    routing = to_device(Routing(torch.zeros(1, 1), torch.ones(1, 1)), "meta")
    assert isinstance(routing, Routing) and routing.weights.device.type == "meta"
    pair, one = to_device(((torch.ones(1), "word"), [torch.ones(1)]), "meta")
    assert isinstance(pair, tuple) and pair[1] == "word" and isinstance(one, list)


def test_strides_are_kept() -> None:
    route = RouteInputs(torch.ones(4, 8)[:, 2:7], RoutingSpec(1), token_ids=torch.ones(1).expand(4))
    moved = to_device(route, "meta")
    assert moved.logits.stride() == (8, 1) and moved.logits.storage_offset() == 2
    assert moved.token_ids is not None and moved.token_ids.stride() == (0,)
