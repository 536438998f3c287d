import pytest
from ttr_controller.reward import RewardConfig, cost_penalty, reward


def test_linear_price_makes_a_fair_exchange_rate():
    config = RewardConfig(lambda_eff=0.8)
    assert reward(0.3, 0.6, 0.5, config) == pytest.approx(-0.3 - 0.08)
    # 0.04 less error for 0.05 more cost is an even trade at this price.
    assert reward(0.26, 0.55, 0.5, config) == pytest.approx(reward(0.3, 0.5, 0.5, config))


def test_one_sided_penalty_charges_little_below_the_target():
    config = RewardConfig(shape="one_sided", pull=0.1)
    assert cost_penalty(0.7, 0.5, config) == pytest.approx(0.2)
    assert cost_penalty(0.3, 0.5, config) == pytest.approx(0.02)
    assert cost_penalty(0.5, 0.5, config) == 0.0


@pytest.mark.parametrize("values", [{"lambda_eff": -1.0}, {"lambda_eff": float("nan")}, {"shape": "x"}, {"pull": 2.0}])
def test_settings_are_checked(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        RewardConfig(**values)


def test_a_broken_rollout_is_an_error():
    with pytest.raises(ValueError, match="finite"):
        reward(float("nan"), 0.5, 0.5, RewardConfig())
