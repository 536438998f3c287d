import pytest
from ttr_controller.report import findings
from ttr_controller.report.results import BreakEven, Fidelity, FidelityRow, Pareto, ParetoPoint, Timing, TimingRow


def pareto(*points: tuple[str, float, float]) -> Pareto:
    return Pareto(tuple(ParetoPoint(method, cost, latent_rmse=error) for method, cost, error in points))


def timing(exact: list[float], ours: list[float], recorded: float | None = None) -> Timing:
    rows = [
        TimingRow(tokens, variant, step_ms=time)
        for variant, times in (("exact", exact), ("near_far", ours))
        for tokens, time in zip((256, 1024, 4096), times, strict=False)
    ]
    return Timing(tuple(rows), None, {"near_far": BreakEven(None, recorded)})


def test_baselines_are_read_at_the_policys_cost() -> None:
    (item,) = findings.compare_policy(
        pareto(
            ("all student", 0.4, 0.4),
            ("all full", 1.0, 0.0),
            ("policy", 0.7, 0.1),
            ("random", 0.701, 0.2),
            ("first steps full", 0.6, 0.3),
            ("first steps full", 0.8, 0.2),
            ("probe", 0.7, 0.05),
        )
    )
    readings = {reading.method: (reading.error, reading.interpolated) for reading in item.others}
    assert readings["random"] == (0.2, False)
    assert readings["first steps full"] == (pytest.approx(0.25), True)
    assert item.best_simple is not None
    assert item.best_simple.method == "random"
    assert item.excess(item.best_simple) == pytest.approx(-0.5)
    assert not item.worse


def test_one_point_of_a_baseline_is_joined_to_the_common_ends() -> None:
    (item,) = findings.compare_policy(
        pareto(("all student", 0.4, 0.4), ("all full", 1.0, 0.0), ("policy", 0.7, 0.21), ("random", 0.6, 0.2))
    )
    assert item.best_simple is not None
    assert item.best_simple.error == pytest.approx(0.15)
    assert item.worse


def test_a_baseline_on_one_side_only_is_not_guessed() -> None:
    (item,) = findings.compare_policy(pareto(("policy", 0.7, 0.2), ("random", 0.6, 0.2)))
    assert item.others == ()
    assert item.best_simple is None


def test_costs_that_all_methods_share_are_not_compared() -> None:
    assert not findings.compare_policy(pareto(("all full", 1.0, 0.0), ("policy", 1.0, 0.0), ("random", 1.0, 0.0)))


def test_a_probe_is_not_a_simple_baseline() -> None:
    (item,) = findings.compare_policy(pareto(("policy", 0.7, 0.2), ("probe", 0.7, 0.1), ("random", 0.7, 0.3)))
    assert item.best_simple is not None
    assert item.best_simple.method == "random"


def test_difference_within_the_standard_error() -> None:
    other = findings.Reading("random", 0.12, 0.02)
    near = findings.Comparison(0.7, None, findings.Reading("policy", 0.10, 0.02), (other,))
    far = findings.Comparison(0.7, None, findings.Reading("policy", 0.05, 0.02), (other,))
    assert near.within_error(other)
    assert not far.within_error(other)


def test_prompts_are_paired() -> None:
    # Prompts differ by 0.3, methods by 0.01 on each prompt: only the pairs can tell.
    mine, theirs = (0.1, 0.4, 0.7), (0.11, 0.41, 0.711)
    other = findings.Reading("random", 0.41, 0.17, by_prompt=theirs)
    paired = findings.Comparison(0.7, None, findings.Reading("policy", 0.4, 0.17, by_prompt=mine), (other,))
    assert not paired.within_error(other)
    apart = findings.Comparison(0.7, None, findings.Reading("policy", 0.4, 0.17), (other,))
    assert apart.within_error(other)


@pytest.mark.parametrize(
    ("ours", "verdict", "faster"),
    [
        ([2, 20, 200], "never", ()),
        ([0.5, 5, 50], "always", (256, 1024, 4096)),
        ([2, 20, 50], "from", (4096,)),
        ([0.5, 20, 50], "mixed", (256, 4096)),
        ([0.5, 20, 200], "mixed", (256,)),
    ],
)
def test_verdicts_of_the_times(ours: list[float], verdict: str, faster: tuple[int, ...]) -> None:
    found = findings.payoff(timing([1, 10, 100], ours), "near_far", "step")
    assert (found.verdict, found.faster) == (verdict, faster)


def test_break_even_point_lies_where_the_lines_cross() -> None:
    # exact grows with tokens^2, the student with tokens; they are equal at 2,000 tokens.
    sizes = (256, 1024, 4096)
    found = findings.payoff(timing([(n / 2000) ** 2 for n in sizes], [n / 2000 for n in sizes]), "near_far", "step")
    assert found.tokens == pytest.approx(2000)
    assert found.largest_ratio == pytest.approx(2.048)


def test_a_recorded_point_is_taken_only_where_the_times_bear_it_out() -> None:
    assert findings.payoff(timing([1, 10, 100], [2, 20, 50], 1500.0), "near_far", "step").tokens == 1500.0
    assert findings.payoff(timing([1, 10, 100], [2, 20, 50], 300.0), "near_far", "step").tokens == pytest.approx(2048)
    assert findings.payoff(timing([1, 10, 100], [2, 20, 200], 1500.0), "near_far", "step").verdict == "never"


def test_times_without_exact_beside_them_decide_nothing() -> None:
    assert findings.payoff(timing([], [2, 20, 50]), "near_far", "step").verdict == "unknown"
    assert findings.payoff(timing([1, 10, 100], [2, 20, 50]), "near_far", "attention").verdict == "unknown"


def test_fidelity_is_summed_up_by_variant_and_time() -> None:
    rows = [
        FidelityRow("a", "hkr", "after", 0.004),
        FidelityRow("b", "hkr", "after", 0.011),
        FidelityRow("c", "hkr", "after", 0.030),
        FidelityRow("d", "hkr", "after", None),
        FidelityRow("a", "hkr", "before", 0.5, 0.9),
    ]
    before, after = findings.fidelity_series(Fidelity(tuple(rows)))
    assert (before.when, before.mean, before.mean_l2) == ("before", 0.5, 0.9)
    assert after.mean == pytest.approx(0.015)
    assert (after.worst_layer, after.layers, after.ready, after.partly_ready) == ("c", 3, 1, 2)
    assert findings.preset_series(Fidelity(tuple(rows)), "hkr") == after
    assert findings.preset_series(Fidelity(tuple(rows)), "near_far") is None
