"""plan_mesh: arithmetic that a laptop can check."""

import pytest

from accel_moe.mesh import MeshPlan, plan_mesh


def test_ep_is_the_innermost_axis_so_that_a_group_is_made_of_neighbours():
    plan = plan_mesh(8, 4)
    assert plan == MeshPlan(dp_replicate=1, efsdp=2, ep=4)
    assert plan.ep_group_of(5) == (4, 5, 6, 7)


def test_hsdp_puts_whole_copies_outside():
    plan = plan_mesh(16, 4, dp_replicate=2, dp_shard=8)
    assert (plan.dp_replicate, plan.efsdp, plan.ep) == (2, 2, 4)
    assert plan.world_size == 16 and plan.dp_shard == 8


@pytest.mark.parametrize("degree", [1, 2, 4, 8])
def test_every_divisor_of_dp_shard_works(degree):
    assert plan_mesh(8, degree).efsdp == 8 // degree


def test_a_degree_that_does_not_divide_dp_shard_is_refused_with_the_degrees_that_do():
    with pytest.raises(ValueError, match=r"moe_ep_degree=3 does not divide dp_shard_size=4.*Use one of 1, 2, 4"):
        plan_mesh(8, 3, dp_replicate=2, dp_shard=4)


def test_without_a_mesh_the_error_speaks_of_the_ranks():
    with pytest.raises(ValueError, match=r"does not divide the number of ranks that FSDP shards over=4 \(4 ranks\)"):
        plan_mesh(4, 8)


def test_degrees_that_do_not_multiply_up_to_the_world_are_refused():
    with pytest.raises(ValueError, match=r"dp_replicate_size=2 x dp_shard_size=2 is 4, but the job has 8 ranks"):
        plan_mesh(8, 2, dp_replicate=2, dp_shard=2)


def test_an_ep_group_inside_a_node_touches_one_node_and_a_wide_one_touches_more():
    assert plan_mesh(16, 8).nodes_per_ep_group(8) == 1
    assert plan_mesh(16, 16).nodes_per_ep_group(8) == 2
