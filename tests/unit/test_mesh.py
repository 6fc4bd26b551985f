"""plan_mesh: arithmetic that a laptop can check."""

import datetime
import warnings

import pytest
import torch

from accel_moe.mesh import MeshPlan, build_mesh, plan_mesh


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


def test_ep_groups_lie_over_the_joined_ranks_of_dp_shard_and_cp():
    plan = plan_mesh(8, 4, dp_replicate=2, dp_shard=2, cp=2)
    assert (plan.dp_replicate, plan.efsdp, plan.ep, plan.cp) == (2, 1, 4, 2)
    assert (plan.dp_shard, plan.fsdp_ranks, plan.world_size) == (2, 4, 8)
    assert plan.ep_group_of(5) == (4, 5, 6, 7)
    assert "a sequence over cp 2 of them" in plan.describe()


def test_a_degree_that_does_not_divide_dp_shard_x_cp_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"ep_degree=3 does not divide dp_shard_size=2 x cp_size=4=8.*1, 2, 4, 8"):
        plan_mesh(8, 3, dp_shard=2, cp=4)


@pytest.mark.parametrize("dp_shard", [None, 2])
def test_a_cp_size_that_does_not_divide_the_ranks_is_refused(dp_shard):
    with pytest.raises(ValueError, match=r"dp_shard_size=2 x cp_size=3 is 6, but the job has 8 ranks"):
        plan_mesh(8, 1, dp_shard=dp_shard, cp=3)


def test_an_ep_group_inside_a_node_touches_one_node_and_a_wide_one_touches_more():
    assert plan_mesh(16, 8).nodes_per_ep_group(8) == 1
    assert plan_mesh(16, 16).nodes_per_ep_group(8) == 2


SEVEN_MINUTES = datetime.timedelta(minutes=7)


@pytest.fixture
def a_job_of_one(tmp_path):
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(tmp_path / "store"), 1),
        rank=0,
        world_size=1,
        timeout=SEVEN_MINUTES,
    )
    yield torch.distributed
    torch.distributed.destroy_process_group()


def timeouts_of(mesh):
    return [group._get_backend(torch.device("cpu")).options._timeout for group in mesh.get_all_groups()]


def test_every_group_of_the_mesh_ends_when_the_job_s_own_would(a_job_of_one):
    assert timeouts_of(build_mesh(plan_mesh(1, 1), "cpu")) == [SEVEN_MINUTES] * 3


def test_where_torch_has_a_public_function_for_timeouts_the_deprecated_one_is_left_alone(a_job_of_one, monkeypatch):
    """As torch 2.14, which warns of the private one."""
    private = torch.distributed.distributed_c10d._set_pg_timeout

    def deprecated(timeout, group=None):
        warnings.warn("`_set_pg_timeout` is deprecated, please use `set_timeout`", FutureWarning, stacklevel=2)
        private(timeout, group)

    monkeypatch.setattr(a_job_of_one, "set_timeout", lambda timeout, group=None: private(timeout, group), raising=False)
    monkeypatch.setattr(a_job_of_one.distributed_c10d, "_set_pg_timeout", deprecated)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert timeouts_of(build_mesh(plan_mesh(1, 1), "cpu")) == [SEVEN_MINUTES] * 3


def test_the_job_s_timeout_is_read_before_groups_are_made_that_may_write_over_it(a_job_of_one, monkeypatch):
    """Groups that are split off the job's own may share its options, with torch's default written into them."""
    import torch.distributed.device_mesh as device_mesh

    make = device_mesh.init_device_mesh

    def writes_over_it(*args, **options):
        made = make(*args, **options)
        monkeypatch.setattr("accel_moe.mesh.default_timeout", lambda: datetime.timedelta(minutes=30))
        return made

    monkeypatch.setattr(device_mesh, "init_device_mesh", writes_over_it)
    assert timeouts_of(build_mesh(plan_mesh(1, 1), "cpu")) == [SEVEN_MINUTES] * 3
