from dataclasses import replace

import pytest
import torch
from attn_kernels.device_model import DeviceModel, Timing, Work, cpu_model, device_model, fit_line, gpu_model
from attn_kernels.targets import Target

PLAIN = DeviceModel(
    name="a device",
    source="not measured: made up",
    flops={"float32": 100.0, "bfloat16": 200.0},
    exponentials=10.0,
    products=20.0,
    bandwidth=40.0,
    launch_seconds=0.5,
    overlaps=False,
    efficiency={"taylor": 0.5, "taylor:3": 0.25, "other": 0.125},
    overhead={"taylor": 3.0},
)
WORK = Work("exact", flops=200.0, exponentials=30.0, products=80.0, values=50.0, launches=2)


def test_time_is_the_fixed_part_and_each_kind_of_work_over_its_rate():
    assert PLAIN.ideal_seconds(WORK, torch.float32) == 2.0 + 3.0 + 4.0 + 5.0
    assert PLAIN.ideal_seconds(WORK, torch.bfloat16) == 1.0 + 3.0 + 4.0 + 2.5
    assert PLAIN.seconds(WORK, torch.float32) == 2 * 0.5 + 14.0 / 0.125


def test_copies_count_where_the_device_has_a_rate_for_them():
    copies = WORK._replace(copied=25.0)
    assert PLAIN.ideal_seconds(copies, torch.float32) == 14.0
    assert replace(PLAIN, copying=20.0).ideal_seconds(copies, torch.float32) == 14.0 + 5.0
    with pytest.raises(ValueError, match="copying must be positive"):
        replace(PLAIN, copying=0.0)


def test_what_overlaps_takes_as_long_as_the_slowest():
    assert replace(PLAIN, overlaps=True).ideal_seconds(WORK, torch.float32) == 5.0


def test_a_variant_has_its_own_numbers_or_those_of_its_operator():
    def seconds(name: str) -> float:
        return PLAIN.seconds(WORK._replace(operator=name), torch.float32)

    assert seconds("taylor:3") == 1.0 + 3.0 + 14.0 / 0.25
    assert seconds("taylor:4") == seconds("taylor") == 1.0 + 3.0 + 14.0 / 0.5
    assert seconds("window:2") == 1.0 + 14.0 / 0.125


def test_a_dtype_without_a_rate_is_refused():
    with pytest.raises(ValueError, match="rates for float32, bfloat16, not for float64"):
        PLAIN.seconds(WORK, torch.float64)


@pytest.mark.parametrize(
    "change", [{"flops": {}}, {"efficiency": {"exact": 1.0}}, {"bandwidth": 0.0}, {"launch_seconds": -1.0}]
)
def test_models_that_make_no_sense_are_refused(change):
    with pytest.raises(ValueError, match="must"):
        replace(PLAIN, **change)


def test_calibration_finds_the_numbers_behind_timings():
    sizes = [Work("window", 100.0 * n, 0.0, 0.0, n, 1) for n in (1, 3, 20)]
    true = replace(PLAIN, efficiency={"other": 1.0, "window": 0.4}, overhead={"window": 1.5})
    timings = [Timing(work, torch.float32, true.seconds(work, torch.float32)) for work in sizes]
    found = PLAIN.calibrate(timings, source="this test")
    assert found.efficiency["window"] == pytest.approx(0.4)
    assert found.overhead["window"] == pytest.approx(1.5)
    assert found.efficiency["taylor"] == 0.5
    assert found.source == "measured: this test"
    assert found.measured
    assert not PLAIN.measured


def test_one_timing_fixes_the_efficiency():
    found = PLAIN.calibrate([Timing(WORK, torch.float32, 29.0)], source="this test")
    assert found.efficiency["exact"] == pytest.approx(0.5)
    assert found.seconds(WORK, torch.float32) == pytest.approx(29.0)
    with pytest.raises(ValueError, match="must be positive"):
        PLAIN.calibrate([Timing(WORK, torch.float32, 0.0)], source="this test")


def test_a_fitted_line_never_starts_below_zero():
    slope, fixed = fit_line([(1.0, 1.0, 1.0), (2.0, 4.0, 4.0)])
    assert fixed == 0.0
    assert 1.0 < slope < 2.0
    # Launches that are estimated at more than the whole call.
    slope, fixed = fit_line([(1.0, -1.0, 1.0), (2.0, 0.5, 2.0)])
    assert slope > 0.0
    assert fixed == 0.0


def test_half_precision_is_not_taken_to_be_faster_on_a_cpu():
    model = cpu_model()
    assert model.flops["bfloat16"] == model.flops["float16"] == model.flops["float32"]


def test_threads_multiply_the_rates_of_a_cpu():
    assert cpu_model(4).flops["float32"] == 4 * cpu_model(1).flops["float32"]
    assert cpu_model(4).copying == 4 * cpu_model(1).copying
    assert device_model("cpu").name == f"CPU, {torch.get_num_threads()} threads"
    assert device_model("meta").name == device_model("cpu").name


@pytest.mark.parametrize("target", Target.__args__)
def test_no_gpu_model_claims_to_be_measured(target):
    model = gpu_model(target)
    assert not model.measured
    assert "not measured" in model.source
    assert model.flops["bfloat16"] > model.flops["float32"]
