import json
import os
import re
import subprocess
import sys
from pathlib import Path

import distributed_tasks as tasks
import pytest


def on_two_processes(output, *names):
    """The results of tasks on two processes, one dict a rank."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, tasks.__file__, str(output), *names],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((output / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_processes(tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("task", ["ddp", "accumulated", "accelerate_loop", "sharded", "sharded_replay"])
def test_two_processes_find_the_step_sizes_and_weights_of_one_with_the_whole_batch(task, ranks, tmp_path):
    one = getattr(tasks, task)(tmp_path)
    for two in (rank[task] for rank in ranks):
        assert len(two["step_sizes"]) >= 20
        assert two["step_sizes"] == pytest.approx(one["step_sizes"], rel=1e-5)
        assert two["weights"] == pytest.approx(one["weights"], abs=1e-5)


def test_rejected_probes_under_fsdp2_see_the_weights_of_the_moment(ranks, tmp_path):
    one = tasks.sharded_replay(tmp_path)
    assert one["probes"] > 25  # probes are rejected
    for rank in ranks:
        assert rank["sharded_replay"]["probes"] == one["probes"]
        assert rank["sharded_replay"]["losses"] == pytest.approx(one["losses"], rel=1e-9)


def test_the_slope_is_summed_over_shards(ranks, tmp_path):
    one = tasks.sharded(tmp_path)
    assert ranks[0]["sharded"]["sharded_moments"]
    assert ranks[0]["sharded"]["slopes"] == pytest.approx(one["slopes"], rel=1e-9)


@pytest.mark.parametrize("task", ["ddp", "accumulated", "dropout", "host_reads", "accelerate_loop", "sharded"])
def test_all_processes_take_the_same_step_sizes_to_the_same_weights(task, ranks):
    first, second = (rank[task] for rank in ranks)
    assert first["step_sizes"] == second["step_sizes"]
    assert first["weights"] == second["weights"]


@pytest.mark.parametrize("task", ["dropout", "accelerate_loop", "broadcast_buffers"])
def test_at_step_size_zero_the_closure_is_the_training_loss_to_the_bit(task, ranks):
    for rank in ranks:
        assert all(replayed == trained for replayed, trained in rank[task]["seen"])


def test_an_accelerate_loop_in_bf16(tmp_path):
    # In processes of its own: Accelerate has one mixed precision a process.
    first, second = (rank["accelerate_loop_bf16"] for rank in on_two_processes(tmp_path, "accelerate_loop_bf16"))
    assert first == second
    assert all(replayed == trained for replayed, trained in first["seen"])


def test_a_probe_costs_one_all_reduce(ranks):
    assert all(rank["communication"]["counts"] == [1, 1, 1] for rank in ranks)


def test_a_step_has_one_host_device_sync_and_a_search_one_more_and_one_a_probe(ranks):
    first, second = (rank["host_reads"]["seen"] for rank in ranks)
    assert first == second
    searches = [searched for _, searched, _ in first]
    assert searches[:2] + searches[3:] == [
        True,
        True,
        True,
        False,
        False,
    ]  # the second, and maybe the third, may lower it
    assert [reads for reads, _, _ in first] == [1 + (1 + probes) * searched for _, searched, probes in first]


def test_a_run_on_two_processes_resumes_bit_for_bit(ranks):
    for rank in ranks:
        if "unsupported" in rank["resumed"]:
            pytest.skip(rank["resumed"]["unsupported"])
        assert rank["resumed"]["whole"] == rank["resumed"]["again"]


def test_sharded_parameters_and_moments_are_saved_and_loaded_bit_for_bit(ranks):
    for rank in ranks:
        assert rank["sharded_and_saved"] == rank["sharded"]


def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(ranks):
    first, second = (rank["not_finite_on_one_process"] for rank in ranks)
    assert first == second
    assert first["skipped"] == 1
    assert first["sums"][2] == first["sums"][1] != first["sums"][3]


def test_run_clm_under_torchrun(tmp_path):
    recipe = Path(__file__).parent.parent / "recipes" / "run_clm.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", recipe]
    flags = ["--optim", "alsals", "--max_steps", "3", "--use_cpu", "--disable_tqdm", "true"]
    small = ["--config_overrides", "n_layer=1,n_embd=16,n_head=2", "--block_size", "64"]
    done = subprocess.run(
        [*command, *flags, *small, "--output_dir", tmp_path / "out"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(re.findall("A sample: ['\"]The ", done.stdout)) == 1
    assert json.loads((tmp_path / "out" / "all_results.json").read_text())["eval_loss"] > 0
