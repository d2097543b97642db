import pytest
from lab import make_lab, train_here

from rlpost.cluster_recipe import Failure
from rlpost.errors import RunError
from rlpost.health import Health

FULL = {"groups/trained": 4.0}


def test_gradients_that_are_not_finite_are_told_and_so_many_in_a_row_end_the_run():
    health = Health(Failure(gradients=2))
    assert health.see(0, FULL, skipped_in_a_row=0) is None
    assert "step 2: the gradient was not finite" in health.see(1, FULL, skipped_in_a_row=1)
    assert health.broken() is None
    health.see(2, FULL, skipped_in_a_row=0)
    health.see(3, FULL, skipped_in_a_row=1)
    assert health.broken() is None
    health.see(4, FULL, skipped_in_a_row=2)
    assert "failure.gradients" in health.broken() and "lower engine.lr" in health.broken()
    health.see(5, FULL, skipped_in_a_row=3, lr_key="algorithm.critic.lr")
    assert "lower algorithm.critic.lr" in health.broken()


def test_steps_that_find_nothing_are_counted_in_a_row_and_end_the_run():
    health, patient = Health(Failure(empty_steps=2)), Health(Failure(empty_steps=0))
    for step, trained in enumerate([0.0, 4.0, 0.0]):
        health.see(step, {"groups/trained": trained}, skipped_in_a_row=0)
        assert health.broken() is None
    for one in (health, patient):
        one.see(3, {}, skipped_in_a_row=0)
    assert "2 in a row found none" in health.broken() and "failure.empty_steps" in health.broken()
    assert patient.broken() is None


def test_a_step_that_never_fills_is_told_once():
    health = Health(Failure())
    said = [health.see(i, FULL | {"groups/missing": n}, skipped_in_a_row=0) for i, n in enumerate([0, 3, 2, 0, 1])]
    assert [one is not None for one in said] == [False, True, False, False, True]
    assert said[1] == "step 2: 3 groups were missing after the last wave (algorithm.groups.max_waves)"


def test_where_nothing_can_be_judged_evaluations_say_so_and_the_run_ends_as_the_recipe_says(
    single_rank, tmp_path, capsys
):
    held_out = (
        "tasks.eval={path: 'rlpost.testbed:chain_sums', config: {split: eval, size: 2, min_terms: 2, max_terms: 3}}"
    )
    asked = ["sft=null", "rewards=[{use: 'mylab.rewards:nothing'}]", "failure.empty_steps=2", "evaluation.every=1"]
    with pytest.raises(RunError, match=r"failure\.empty_steps"):
        train_here(make_lab(tmp_path), single_rank, "unjudged", *asked, held_out)
    assert "evaluation after 1 steps: no answer could be judged on 2 problems" in capsys.readouterr().out
