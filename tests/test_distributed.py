"""Real processes, gloo on the CPU: the same numbers on one process and on several.

What each process does is in ``distributed_modes.py``. All modes run in two spawns, of 4 and of 2 processes.
"""

from __future__ import annotations

import json
import multiprocessing
from types import SimpleNamespace

import distributed_modes as modes
import pytest
import torch
import torch.multiprocessing
from test_sinks import scalars

COUNTS = ("flips", "updates", "stalled")

# Forked from a process that has imported what all of them need, which would take each of them seconds.
START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
IMPORTS = ["torch._dynamo", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.optim"]
IMPORTS += ["torch.distributed.tensor.parallel", "torchao.float8"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> SimpleNamespace:
    """The counts of one process, and what each of 4 and of 2 processes returns from each mode."""
    folder = tmp_path_factory.mktemp("distributed")
    one, sharded, _ = modes.run()
    weights = {name: p.detach() for name, p in sharded.model.named_parameters()}
    results = {}
    multiprocessing.set_forkserver_preload(IMPORTS)
    for world in (4, 2):
        torch.multiprocessing.start_processes(modes.work, (world, folder, weights), world, start_method=START_METHOD)
        results[world] = [json.loads((folder / str(world) / f"{rank}.json").read_text()) for rank in range(world)]
    return SimpleNamespace(one=one, weights=weights, results=results, folder=folder)


def of_mode(runs, world: int, mode: str) -> list:
    """Wait for all processes and return their results."""
    found = [result[mode] for result in runs.results[world]]
    for result in found:
        assert "error" not in result, result["error"]
    return found


def assert_counts(found: dict, expected: dict) -> None:
    for key in COUNTS:
        assert found[key] == expected[key], key


def assert_close(found, expected) -> None:
    """Equal up to the last bits of floating-point sums."""
    if isinstance(expected, (list, dict)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_close(found[key], expected[key])
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, nan_ok=True)
    else:
        assert found == expected


def only(numbers: dict, formats: list[str]) -> dict:
    """Restrict the counts to these formats."""
    return {key: {n: v for n, v in numbers[key].items() if n.split("@")[1] in formats} for key in COUNTS}


SHARDINGS = [(world, name) for world in (2, 4) for name in modes.SHARDINGS]


@pytest.mark.parametrize(("world", "name"), SHARDINGS, ids=str)
def test_counts_under_each_sharding_equal_those_of_one_process(runs, world, name):
    for found in (result[name] for result in of_mode(runs, world, "shardings")):
        assert found["is_equal"], "the trajectories differ, so that nothing is shown"
        assert_counts(found, only(runs.one, found["formats"]))
        assert found["steps"] == modes.STEPS
        assert sum(found["flips"].values()) > 0


@pytest.mark.parametrize("world", [2, 4])
def test_records_equal_those_of_one_process(runs, world):
    first, *others = (result["fsdp"] for result in of_mode(runs, world, "shardings"))
    assert first["records"] == json.loads(json.dumps(runs.one["records"]))
    assert not any(other["records"] for other in others)
    assert all(other["table"] == first["table"] == runs.one["table"] for other in others)


@pytest.mark.parametrize("name", modes.OPTIONS)
def test_counts_with_each_option_equal_those_of_one_process(runs, name):
    expected, _, _ = modes.run(quantizer=["float8_e4m3", "int4:g32"], **modes.OPTIONS[name])
    for rank, result in enumerate(of_mode(runs, 2, "options")):
        assert_counts(result[name], expected)
        if rank == 0:
            assert_close(result[name]["records"], json.loads(json.dumps(expected["records"])))


def test_what_differs_between_two_syncs_is_that_of_gathered_weights(runs):
    first, *others = of_mode(runs, 2, "syncs")
    for name, result in first.items():
        assert result["found"].keys() == result["brute"].keys()
        for layer, expected in result["brute"].items():
            assert result["found"][layer] == pytest.approx(expected), (name, layer)
        assert sum(found[0] for found in result["found"].values()) > 0
        assert all(0 < bits < 16 for bits in result["sizes"].values())
        assert all(other[name] == result for other in others)


def test_weights_that_flip_between_two_syncs_are_those_of_gathered_weights(runs):
    first, *others = of_mode(runs, 2, "touched")
    assert first["found"] == first["brute"]
    assert 0 < sum(found[0] for found in first["found"].values()) < sum(found[1] for found in first["found"].values())
    # Two windows, and a shard counts as a layer.
    assert first["layers"][1] > 2 * len(first["found"])
    assert all(other == first for other in others)


@pytest.mark.parametrize("world", [2, 4])
def test_training_equals_brute_force_on_gathered_weights(runs, world):
    for found in of_mode(runs, world, "training"):
        assert [found[key] for key in COUNTS] == found["brute"]
        assert found["steps"] == 6


@pytest.mark.parametrize("world", [2, 4])
def test_the_mean_of_ternary_weights(runs, world):
    first, *others = of_mode(runs, world, "means")
    for name, exact in first["exact"].items():
        # The float64 mean, rounded once, is the same on any number of processes.
        assert first["means"][name] == pytest.approx(exact, rel=2**-24)
    assert all(other["means"] == first["means"] for other in others)
    assert first["flips"] == of_mode(runs, 6 - world, "means")[0]["flips"]


@pytest.mark.parametrize("world", [2, 4])
def test_number_and_size_of_collectives(runs, world):
    layers, columns = 5, 7
    # One number per layer, and a flag whether it counts.
    table = ["allreduce_", 2 * layers]
    agreement, sums = ["allreduce_", 2], ["allreduce_", layers * (columns + 1)]
    # The first step also encodes before it. Steps 1 and 3 are logging points. Last entry: get_... and print.
    steps = [[agreement, table, table], [table, sums], [table], [table, sums], []]
    for result in of_mode(runs, world, "collectives"):
        assert result["tensorwise"] == steps
        assert result["two_meshes"] == steps
        assert result["plain"] == [[]] * 5

        several = ["allreduce_", layers * (2 + 2 + (world + 1))]
        sums_of_four = ["allreduce_", 4 * sums[1]]
        assert result["several"][1:] == [[several, sums_of_four], [several], [several, sums_of_four], []]
        assert result["by_row"] == [[agreement], [sums_of_four], [], [sums_of_four], []]

        # One number for each of the 128 rows; only this layer is sharded.
        rows, sums_of_one = ["allreduce_", 128 + 1], ["allreduce_", columns + 1]
        assert result["cut_rows"][1:] == [[rows, sums_of_one], [rows], [rows, sums_of_one], []]


def test_writes_on_all_processes_are_not_flips(runs):
    expected, _, _ = modes.run(quantizer=["float8_e4m3", "float8_e4m3:row"], before=modes.write_between)
    untouched, _, _ = modes.run(quantizer=["float8_e4m3", "float8_e4m3:row"])
    assert expected["flips"] != untouched["flips"]
    for result in of_mode(runs, 2, "writes"):
        assert_counts(result["all"], expected)


def test_the_step_after_a_write_to_one_shard_is_not_counted(runs):
    def write_a_half(step, model):
        if step == 6:
            with torch.no_grad():
                model.first.weight[32:].mul_(2)

    expected, _, _ = modes.run(quantizer=["float8_e4m3", "float8_e4m3:row"], before=write_a_half, log_every=1)
    first, second = (result["one"] for result in of_mode(runs, 2, "writes"))
    assert first["flips"] == second["flips"]
    for found, record in zip(first["records"], json.loads(json.dumps(expected["records"])), strict=True):
        for layer, of_one in zip(found["layers"], record["layers"], strict=True):
            if (found["step"], layer["name"]) == (7, "first.weight@float8_e4m3"):
                assert layer["window"]["weight_steps"] == layer["window"]["flips"] == 0
                assert of_one["window"]["flips"] > 0
            else:
                assert layer["window"] == of_one["window"]


def test_a_process_without_a_gradient_keeps_no_other_waiting(runs):
    expected, _, _ = modes.run(quantizer=["float8_e4m3", "float8_e4m3:row"])
    first, second = (result["no_gradient_on_one"] for result in of_mode(runs, 2, "writes"))
    for key in COUNTS:
        assert first[key] == second[key]
        others = {name: count for name, count in expected[key].items() if not name.startswith("uneven")}
        assert others == {name: count for name, count in first[key].items() if name in others}
    assert 0 < first["updates"]["uneven.weight@float8_e4m3"] < expected["updates"]["uneven.weight@float8_e4m3"]


@pytest.mark.parametrize("world", [2, 4])
def test_ddp_and_zero_count_each_weight_once(runs, world):
    found = of_mode(runs, world, "data_parallel")
    for result in found:
        assert_counts(result["ddp_of_all_formats"], runs.one)
        assert [result["ddp"][key] for key in COUNTS] == result["ddp"]["brute"]
        assert_counts(result["zero"], runs.one)
    within = [result["zero_within"] for result in found]
    for key in COUNTS:
        assert sum(len(part[key]) for part in within) == len(runs.one[key])
        assert {name: count for part in within for name, count in part[key].items()} == runs.one[key]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", ["dynamic", "precomputed"])
def test_codes_match_torchaos_float8_all_gather(runs, name, world):
    pytest.importorskip("torchao")
    for result in of_mode(runs, world, "torchao"):
        assert all(result[name]["are_equal"])
        assert result[name]["flips"] == result[name]["cast_flips"]
        assert sum(result[name]["flips"].values()) > 0
        assert result[name]["quantizers"] == ["float8_e4m3"] * 2


@pytest.mark.parametrize("name", ["layer", "statistic", "tracking"])
def test_a_fault_on_one_process_keeps_no_other_waiting(runs, name):
    first, second = (result[name] for result in of_mode(runs, 2, "faults"))
    broken, other = (first, second) if name == "statistic" else (second, first)
    assert first["flips"] == second["flips"]
    assert first["steps"] == second["steps"] == modes.STEPS
    if name == "tracking":
        assert any("tracking has stopped" in text for text in broken["warnings"])
        assert sum("no longer tracked on another process" in text for text in other["warnings"]) == 5
        return
    assert any("broken on purpose" in text for text in broken["warnings"])
    (text,) = other["warnings"]
    assert "'first.weight' is no longer tracked" in text
    assert "no longer tracked on another process" in text
    # Nothing else is lost.
    expected, _, _ = modes.run(quantizer="float8_e4m3")
    for layer in ("second.weight", "uneven.weight", "three.weight", "single.weight"):
        assert first["flips"][layer] == expected["flips"][layer]


BROKEN = {"first*": "bfloat16", "*": "float8_e4m3"}
OTHERS = ("second.weight", "uneven.weight", "three.weight", "single.weight")


@pytest.mark.parametrize("action", ["always", "error"])
@pytest.mark.parametrize("part", modes.PARTS)
def test_a_quantizer_that_raises_on_one_process(runs, part, action):
    """Also with warnings as errors, which are raised when no process is waiting any more."""
    first, second = (result[f"{part}-{action}"] for result in of_mode(runs, 2, "faults_of_a_quantizer"))
    for key in (*COUNTS, "steps"):
        assert first[key] == second[key]
    assert first["steps"] == modes.STEPS
    assert "broken on purpose" in second["warnings"][0]
    assert len(second["warnings"]) == 1
    assert all("no longer tracked on another process" in text for text in first["warnings"])
    # Counts up to the record after step 3, before the fault.
    expected, _, _ = modes.run(quantizer=BROKEN, log_every=3)
    assert first["records"][0] == json.loads(json.dumps(expected["records"][0]))
    at_3 = flips_at(runs, 3, BROKEN)
    assert first["flips"]["first.weight"] == at_3["first.weight"]
    if part == "name":
        assert first["flips"] == at_3
    else:
        assert len(first["warnings"]) == 1
        for layer in OTHERS:
            assert first["flips"][layer] == expected["flips"][layer]


def test_one_process_does_not_notice_that_tracked_weights_change(runs):
    first, second = (result["fails"] for result in of_mode(runs, 2, "faults_of_the_list"))
    assert first["flips"] == second["flips"] == flips_at(runs, 3, BROKEN, left_out="three.weight")
    assert [text for text in second["warnings"] if "broken on purpose" in text]
    assert len(first["warnings"]) == 5
    assert all("do not track the same weights" in text for text in first["warnings"])


def test_one_process_does_not_notice_that_a_plain_weight_is_frozen(runs):
    first, second = (result["plain"] for result in of_mode(runs, 2, "faults_of_the_list"))
    at_3 = flips_at(runs, 3, BROKEN)
    assert first["flips"]["second.weight"] == second["flips"]["second.weight"] == at_3["second.weight"]
    assert "tracking has stopped" in second["warnings"][0]
    assert all("no longer tracked on another process" in text for text in first["warnings"])
    assert first["flips"]["first.weight"] > at_3["first.weight"]


def test_a_weight_that_is_added_later(runs):
    found = [result["goes_well"] for result in of_mode(runs, 2, "faults_of_the_list")]
    expected, _, _ = modes.run(quantizer=BROKEN)
    for result in found:
        assert result["warnings"] == []
        assert result["flips"] == {**found[0]["flips"]}
        assert 0 < result["flips"]["three.weight"] < expected["flips"]["three.weight"]
        for layer in ("first.weight", "second.weight", "uneven.weight", "single.weight"):
            assert result["flips"][layer] == expected["flips"][layer]


@pytest.mark.parametrize("name", ["after_a_record", "before_any"])
def test_weights_that_differ_later_keep_their_common_counts(runs, name):
    expected = flips_at(runs, 3, "float8_e4m3") if name == "after_a_record" else dict.fromkeys(range(5), 0)
    for rank, result in enumerate(result[name] for result in of_mode(runs, 2, "faults_of_the_list")):
        assert list(result["flips"].values()) == list(expected.values())
        # The first process reports what all find out.
        assert sum("do not track the same weights" in text for text in result["warnings"]) == (0 if rank else 6)


def flips_at(runs, step: int, quantizer, left_out: str = "") -> dict[str, int]:
    """The counts of one process after this many steps."""
    expected, _, _ = modes.run(quantizer=quantizer, steps=range(step))
    return {name: count for name, count in expected["flips"].items() if name != left_out}


def test_a_batch_of_plain_weights_raises_on_one_process(runs):
    pytest.importorskip("numba")
    first, second = of_mode(runs, 2, "faults_of_plain_weights")
    expected, _, _ = modes.run(quantizer="float8_e4m3")
    assert first["warnings"] == []
    assert first["flips"] == expected["flips"]
    assert all("broken on purpose" in text for text in second["warnings"])
    assert len(second["warnings"]) == 4
    assert second["flips"]["second.weight"] == expected["flips"]["second.weight"]
    assert second["flips"]["first.weight"] < expected["flips"]["first.weight"]


@pytest.mark.parametrize("action", ["always", "error"])
@pytest.mark.parametrize("kind", ["sink", "alert"])
def test_a_writer_that_fails_keeps_no_other_waiting(runs, kind, action):
    first, second = (result[f"{kind}-{action}"] for result in of_mode(runs, 2, "faults_of_the_writer"))
    expected, _, _ = modes.run(quantizer="float8_e4m3", log_every=3)
    for result in (first, second):
        assert_counts(result, expected)
        assert result["steps"] == modes.STEPS
    assert len(first["warnings"]) == 1
    assert "broken on purpose" in first["warnings"][0]
    assert second["warnings"] == []
    if kind == "alert":
        # The other sink gets all records.
        assert first["records"] == json.loads(json.dumps(expected["records"]))


def test_a_process_without_sinks_contributes_its_weights(runs):
    expected, _, _ = modes.run(quantizer="float8_e4m3:row", before=modes.spoil, **modes.READ)
    first, second = of_mode(runs, 2, "readers")
    assert_counts(first, expected)
    assert_close(first["records"], json.loads(json.dumps(expected["records"])))
    assert second["records"] == []
    nonfinite = [layer["nonfinite"] for layer in first["records"][-1]["layers"]]
    assert nonfinite == [7, 0, 0, 0, 0]


def test_several_optimizers_form_one_run(runs):
    expected, _, _ = modes.run(quantizer=BROKEN, log_every=3)
    first, second = of_mode(runs, 2, "several_optimizers")
    # Three tensorwise weights in the second, which steps first, and one in the first; then the counts of each.
    step, sums = [["allreduce_", 6], ["allreduce_", 2]], [["allreduce_", 16], ["allreduce_", 24]]
    for result in (first, second):
        assert_counts(result["whole"], expected)
        assert (
            result["whole"]["calls"]
            == result["broken"]["calls"]
            == [step, [*step, *sums], step, step, [*step, *sums], step, step]
        )
        for layer in OTHERS:
            assert result["broken"]["flips"][layer] == expected["flips"][layer]
    by_name = {layer["name"]: layer for layer in json.loads(json.dumps(expected["records"][-1]))["layers"]}
    assert {layer["name"]: layer for layer in first["whole"]["records"][-1]["layers"]} == by_name
    assert first["broken"]["flips"] == second["broken"]["flips"]
    assert len(first["broken"]["records"]) == 3
    assert "broken on purpose" in second["broken"]["warnings"][0]
    # A record that fails ends the tracking of its own optimizer, on all processes, and not that of the leader.
    for result in (first["record"], second["record"]):
        assert result["calls"] == first["whole"]["calls"]
        for layer in ("first.weight", "three.weight"):
            assert result["flips"][layer] == expected["flips"][layer]
    assert first["record"]["warnings"] == [
        "weightflip: tracking has stopped, training continues: RuntimeError: broken on purpose"
    ]
    assert all("no longer tracked on another process" in text for text in second["record"]["warnings"])
    assert len(second["record"]["warnings"]) == 3
    at_6 = [
        {layer["name"]: layer for layer in records[1]["layers"]}
        for records in (first["record"]["records"], json.loads(json.dumps(expected["records"])))
    ]
    assert list(at_6[0]) == ["first.weight", "three.weight"]
    assert all(at_6[0][name] == at_6[1][name] for name in at_6[0])


def test_no_process_waits_for_a_broken_leader_without_sharded_weights(runs):
    expected, _, _ = modes.run(quantizer="float8_e4m3", log_every=3)
    first, second = of_mode(runs, 2, "unsharded_leader")
    assert first["steps"] == [3, 6, 8]
    assert first["warnings"] == []
    assert [text for text in second["warnings"] if "broken on purpose" in text] == second["warnings"] != []
    assert first["flips"] == second["flips"] == expected["flips"]


def test_no_process_waits_in_a_step_that_initializes_state(runs):
    """Only the first process has state, and only the second has gradients of 0."""
    first, second = of_mode(runs, 2, "phantom_steps")
    assert first["steps"] == second["steps"] == modes.STEPS
    assert [first["inner_steps"], second["inner_steps"]] == [modes.STEPS, modes.STEPS + 1]
    for key in COUNTS:
        assert first[key] == second[key]
    assert sum(first["flips"].values()) > 0


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "float8_e4m3:row"])
def test_a_weight_that_one_process_freezes_alone_is_given_up(runs, quantizer):
    expected, _, _ = modes.run(quantizer=quantizer)
    at_3 = flips_at(runs, 3, quantizer)
    for rank, result in enumerate(result[quantizer] for result in of_mode(runs, 2, "frozen_on_one")):
        # The timeout of the process group is 60 s.
        assert result["seconds"] < 30
        assert result["steps"] == modes.STEPS
        assert result["flips"]["three.weight"] == at_3["three.weight"]
        for layer in ("first.weight", "second.weight", "uneven.weight"):
            assert result["flips"][layer] == expected["flips"][layer]
        texts = "\n".join(result["warnings"])
        assert "'three.weight' is no longer tracked" in texts
        assert ("make the same changes on all processes" in texts) or rank == 0


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "float8_e4m3:row"])
def test_all_processes_agree_whether_a_step_only_initializes_state(runs, quantizer):
    def one_more(model):
        optimizer = adamw_with_state(model)
        assert len(optimizer.state) == 5
        return optimizer

    expected, _, _ = modes.run(quantizer=quantizer, make=one_more, log_every=3)
    first, second = of_mode(runs, 2, "made_states")
    for result in (first, second):
        found = result[f"framework {quantizer}"]
        assert_counts(found, expected)
        assert found["steps"] == modes.STEPS
    ours, theirs = (result[f"warm-up {quantizer}"] for result in (first, second))
    assert ours["steps"] == theirs["steps"] == modes.STEPS + 1
    for key in COUNTS:
        assert ours[key] == theirs[key]
    assert sum(ours["updates"].values()) > sum(expected["updates"].values())


def adamw_with_state(model) -> torch.optim.Optimizer:
    optimizer = modes.adamw(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    (group,) = optimizer.param_groups
    group["lr"] = 0.0
    optimizer.step()
    group["lr"] = 0.02
    return optimizer


def test_steps_in_inference_mode(runs):
    expected, _, _ = modes.run(
        quantizer="float8_e4m3", make=lambda model: torch.optim.SGD(model.parameters(), lr=0.02), log_every=3
    )
    for result in of_mode(runs, 2, "inference"):
        assert result["warnings"] == []
        assert_counts(result, expected)


@pytest.mark.parametrize("world", [2, 4])
def test_in_flight_gradients(runs, world):
    expected, _, _ = modes.run(quantizer="float8_e4m3")
    for result in of_mode(runs, world, "late_gradients"):
        assert result["were_late"]
        assert_counts(result, expected)


@pytest.mark.parametrize("world", [2, 4])
def test_a_step_skipped_by_a_gradient_scaler_does_not_count(runs, world):
    def fused(model):
        return torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)

    expected, _, _ = modes.run(quantizer="float8_e4m3", make=fused, steps=[0, 1, 2, 3, 5, 6, 7])
    for result in of_mode(runs, world, "skipped_steps"):
        assert_counts(result, expected)
        assert result["steps"] == modes.STEPS - 1


def test_weights_of_a_mesh_are_added_up_in_its_process_group(runs):
    for result in of_mode(runs, 4, "groups"):
        assert result["is_of_mesh"]
        assert result["is_another"]


def test_a_process_outside_the_mesh_of_a_weight_skips_it(runs):
    for rank, result in enumerate(of_mode(runs, 4, "groups")):
        if rank < 2:
            assert result["updates"] == {"group0.param0": 64, "group0.param1": 64}
        else:
            assert result["updates"] == {"group0.param1": 64}
            assert "and this is not one of them" in result["skipped"]["group0.param0"]


def test_process_groups_are_released_with_the_default_group(runs):
    expected, _, _ = modes.run(quantizer="float8_e4m3")
    for result in of_mode(runs, 4, "second_world"):
        assert result["is_deleted"]
        # From a step in between.
        assert "call close() before torch.distributed.destroy_process_group()" in result["warnings"][0]
        assert_counts(result["first"], expected)
        assert_counts(result["second"], expected)


def test_processes_with_different_layers_on_one_mesh_are_refused(runs):
    for rank, result in enumerate(of_mode(runs, 2, "faults")):
        assert result["stages"]["flips"] == {}
        assert all("do not track the same weights" in text for text in result["stages"]["warnings"])
        assert len(result["stages"]["warnings"]) == (0 if rank else 2)


def test_what_cannot_be_exact_is_refused(runs):
    for found in of_mode(runs, 2, "refusals"):
        assert "cut the groups of 32 neighbors" in found["cut_block"]
        assert "[0, 16, 32]" in found["cut_block"]
        assert "scope = 'element'" in found["function"]
        assert "squared" in found["function"]
        assert "Partial" in found["partial"]
        assert found["whole_block"] == found["function_with_scope"] == found["replicated_function"] == ""


def test_one_process_may_read_alone(runs):
    first, second = (result["seen"] for result in of_mode(runs, 2, "on_one_only"))
    assert len(first) == 2
    assert first[1:] == second
    # The numbers of the last logging point, as the text says.
    assert first[0].startswith("after step 4\n")
    expected, _, _ = modes.run(quantizer="float8_e4m3", steps=range(4))
    assert second == [expected["flips"]]


def test_only_the_first_process_writes_to_disk(runs):
    here = runs.folder / "2"
    (first, _) = of_mode(runs, 2, "writer")
    for kind in ("sharded", "plain"):
        assert [path.name for path in (here / kind).iterdir()] == ["0"]
    written = scalars(here / "sharded" / "0")
    assert written == scalars(here / "plain" / "0")
    assert written
    lines = [json.loads(line) for line in (here / "0.jsonl").read_text().splitlines()]
    assert [line["record"] for line in lines if "record" in line] == first["records"]
    assert not (here / "1.jsonl").exists()


def test_a_run_of_four_processes_resumes_on_two_and_on_one(runs):
    saved = of_mode(runs, 4, "save")[0]
    alone = modes.resume(lambda model: None, runs.folder, runs.weights)
    for found in (*of_mode(runs, 2, "resume"), alone):
        assert_counts(found["at"], saved)
        assert found["is_equal"]
        assert_counts(found, runs.one)
        assert found["steps"] == modes.STEPS
        assert found["rates"] == runs.one["rates"]


def test_the_state_of_one_process_loads_anywhere(runs):
    of_mode(runs, 4, "save")
    state = torch.load(runs.folder / "flip_tracking.pt", weights_only=True)
    _, _, optimizer = modes.run(steps=range(0))
    optimizer.load_state_dict({**optimizer.inner.state_dict(), "flip_tracking": state})
    assert optimizer.tracker.step_count == modes.STEPS // 2
