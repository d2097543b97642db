import re
from pathlib import Path

import pytest

from rlpost.alarms import RULES, Lookout, Past, alarms_of, trend
from rlpost.recipe import read

ROOT = Path(__file__).parent.parent


def rows(**columns):
    """A line a step from columns of equal length."""
    names = {name.replace("__", "/").replace("_AT_", "@"): values for name, values in columns.items()}
    return [
        {"step": i, **dict(zip(names, line, strict=True))} for i, line in enumerate(zip(*names.values(), strict=True))
    ]


def steady(value, n=30):
    """Almost equal values: a tenth of a percent up and down."""
    return [value * (1.001 if i % 2 else 0.999) for i in range(n)]


def evals(pairs):
    """Steps with a reward, and an evaluation after each."""
    found = []
    for i, (reward, score) in enumerate(pairs):
        found += [{"step": 5 * i + j, "reward/mean": reward} for j in range(5)]
        found.append({"step": 5 * i + 4, "eval/pass@1": score, "eval/num_problems": 200, "eval/n": 4})
    return found


FIRES = {
    "entropy_collapse": rows(policy__entropy=steady(1.0, 10) + steady(0.1, 10), reward__solved_frac=steady(0.4, 20)),
    "entropy_rise": rows(policy__entropy=steady(0.5, 10) + steady(2.0, 10)),
    "kl_spike": rows(policy__kl_ref=[*steady(0.02, 25), 0.5]),
    "mismatch": rows(mismatch__k3=steady(0.05, 6)),
    "length_explosion": rows(
        rollouts__length_mean=steady(100.0, 10) + steady(180.0, 10),
        rollouts__truncated_frac=steady(0.01, 10) + steady(0.3, 10),
    ),
    "truncation": rows(rollouts__truncated_frac=steady(0.5, 6)),
    "reward_hacking": rows(
        reward__mean=steady(0.4, 20) + steady(0.8, 20),
        rollouts__pass_AT_1=steady(0.5, 40),
        rollouts__pass_AT_8=steady(0.9, 20) + steady(0.6, 20),
    ),
    "held_out_fall": evals([(0.4, 0.5), (0.5, 0.7), (0.8, 0.45)]),
    "zero_spread": rows(groups__spread_frac=steady(0.1, 6), reward__solved_frac=steady(0.02, 6)),
    "gradient_spike": rows(optim__grad_norm=[*steady(0.3, 25), 30.0]),
    "unjudged": rows(rollouts__num=steady(100.0, 6), reward__unjudged__math=steady(20.0, 6)),
    "reward_fails": rows(rollouts__num=steady(100.0, 6), reward__endings__math__timeout=steady(2.0, 6)),
}
QUIET = {
    "entropy falls to where everything is solved": rows(
        policy__entropy=steady(1.0, 10) + steady(0.1, 10), reward__solved_frac=steady(0.4, 10) + steady(0.95, 10)
    ),
    "entropy falls by half": rows(policy__entropy=steady(1.0, 10) + steady(0.5, 10)),
    "entropy rises from nearly nothing": rows(policy__entropy=steady(0.01, 10) + steady(0.1, 10)),
    "KL grows slowly": rows(policy__kl_ref=[0.001 * i for i in range(40)]),
    "KL jumps from rounding to little": rows(policy__kl_ref=[*steady(1e-6, 25), 1e-3]),
    "rounding between generator and trainer": rows(mismatch__k3=steady(1e-4, 10), mismatch__ess_frac=steady(0.99, 10)),
    "stale tokens alone differ": rows(mismatch__k3=steady(0.05, 10), mismatch__age_0__k3=steady(1e-5, 10)),
    "answers grow and finish": rows(
        rollouts__length_mean=steady(100.0, 10) + steady(300.0, 10), rollouts__truncated_frac=steady(0.01, 20)
    ),
    "reward and pass@k rise together": rows(
        reward__mean=steady(0.4, 20) + steady(0.8, 20), rollouts__pass_AT_8=steady(0.6, 20) + steady(0.9, 20)
    ),
    "pass@k falls with the reward": rows(
        reward__mean=steady(0.8, 20) + steady(0.4, 20), rollouts__pass_AT_8=steady(0.9, 20) + steady(0.6, 20)
    ),
    "held-out success falls by chance": evals([(0.4, 0.5), (0.5, 0.70), (0.8, 0.66)]),
    "held-out success falls with the reward": evals([(0.4, 0.5), (0.8, 0.7), (0.3, 0.3)]),
    "half of the groups have spread": rows(groups__spread_frac=steady(0.5, 10)),
    "gradients within tenfold": rows(optim__grad_norm=[*steady(0.3, 25), 3.0]),
    "a spike among the first gradients": rows(optim__grad_norm=[0.1, 5.0, 0.1, 0.1]),
    "a few without a verdict": rows(rollouts__num=steady(100.0, 6), reward__unjudged__math=steady(5.0, 6)),
    "many wrong answers, few failures": rows(
        rollouts__num=steady(100.0, 6),
        reward__endings__math__wrong=steady(90.0, 6),
        reward__endings__math__error=steady(0.5, 6),
    ),
    "too short to say": rows(policy__entropy=[1.0, 0.01], groups__spread_frac=[0.0, 0.0]),
    "nothing was logged": [],
}


def test_every_rule_has_a_history_in_which_it_fires():
    assert FIRES.keys() == RULES.keys()


@pytest.mark.parametrize("name", FIRES)
def test_a_rule_fires_on_its_sign_and_no_other_does(name: str):
    [alarm] = alarms_of(FIRES[name])
    assert alarm.name == name and alarm.active
    assert re.search(r"\d", alarm.said), "it says the figures"
    assert alarm.said.endswith(".") and alarm.advice.endswith(".")
    assert alarm.line().startswith(f"alarm at step {alarm.step + 1}: {RULES[name].title}. ")


@pytest.mark.parametrize("why", QUIET)
def test_no_rule_fires_where_nothing_is_wrong(why: str):
    assert alarms_of(QUIET[why]) == []


@pytest.mark.parametrize("value", [None, float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_an_alarm(value):
    [alarm] = alarms_of(rows(optim__grad_norm=[0.3, value]))
    assert alarm.name == "gradient_spike" and "not finite" in alarm.said


def test_skipped_updates_are_an_alarm():
    [alarm] = alarms_of(rows(optim__grad_norm=[0.3, 0.3, 0.3], optim__skipped_steps=[0, 0, 1]))
    assert (alarm.name, alarm.step) == ("gradient_spike", 2)


def test_an_alarm_stands_at_the_step_where_it_first_fired_and_says_whether_it_holds():
    history = rows(groups__spread_frac=steady(0.8, 10) + steady(0.05, 10) + steady(0.8, 10))
    [alarm] = alarms_of(history)
    assert not alarm.active
    assert alarms_of(history[: alarm.step + 1])[0].active and alarms_of(history[: alarm.step]) == []


def test_an_evaluation_after_the_last_step_leaves_the_alarms_of_steps_on():
    history = [*FIRES["zero_spread"], {"step": 5, "eval/pass@1": 0.5, "eval/num_problems": 10}]
    assert [(alarm.name, alarm.active) for alarm in alarms_of(history)] == [("zero_spread", True)]


def test_the_lookout_says_each_alarm_once_as_the_history_does():
    for name, history in FIRES.items():
        lookout = Lookout()
        said = [alarm for row in history for alarm in lookout.observe(row["step"], row)]
        assert [(one.name, one.step) for one in said] == [(one.name, one.step) for one in alarms_of(history)], name


def test_a_resumed_run_does_not_repeat_what_was_said_and_says_what_is_new():
    history = FIRES["zero_spread"]
    assert [one.name for row in history[:5] for one in Lookout(history[:5]).observe(5, row)] == []
    lookout = Lookout(history[:4])
    assert [one.name for one in lookout.observe(4, history[4])] == ["zero_spread"]


def test_values_that_are_missing_or_not_finite_are_passed_over():
    past = Past([{"x": 1.0}, {}, {"x": None}, {"x": float("nan")}, {"x": 2.0}, {"x": 3.0}])
    assert past.last("x", 2) == [2.0, 3.0] and past.last("x", 2, skip=1) == [1.0, 2.0]
    assert past.first("x", 2) == [1.0, 2.0]
    assert past.mean("x", 3) == 2.0 and past.mean("x", 4) is None


def test_a_trend_is_the_difference_of_means_in_standard_errors():
    history = rows(x=[0.0, 1.0] * 10 + [1.0, 2.0] * 5)
    found = trend(Past(history), "x")
    assert found is not None and found.change == pytest.approx(1.0)
    assert found.z == pytest.approx(1.0 / (2 * (2.5 / 9) / 10) ** 0.5)
    assert trend(Past(history[:29]), "x") is None


def test_advice_names_fields_of_a_recipe_that_exist():
    text = " ".join(rule.advice for rule in RULES.values())
    named = set(re.findall(r"\b((?:algorithm|engine|sampling)(?:\.\w+)+)", text))
    assert len(named) > 8
    _, problems = read(ROOT / "recipes/quickstart.yaml", [])
    assert not problems
    for field in named:
        _, problems = read(ROOT / "recipes/quickstart.yaml", [f"{field}=null"])
        assert not [problem for problem in problems if "no such key" in problem], field
