import pytest

from rlpost.errors import RunError
from rlpost.testbed import ALPHABET, chain_sums, correct_answer, correct_chain


def rows(**kwargs):
    return list(chain_sums(**{"split": "train", "size": 300, "min_terms": 2, "max_terms": 8, **kwargs}))


def test_chain_sums_follow_from_the_seed_alone():
    """The expected rows are written out: a change of Python or of the drawing would change every result."""
    assert [row["prompt"] for row in rows(size=3, min_terms=4)] == [
        "7-2+4+3-5+5-7+2=",
        "9+9-7+6-1-6+9-8=",
        "8+0+3+6-4=",
    ]
    assert rows(seed=1) == rows(seed=1)
    assert rows(seed=1) != rows(seed=2)


def test_chain_sums_repeat_no_problem():
    prompts = [row["prompt"] for row in rows()]
    assert len(set(prompts)) == len(prompts) == 300


def test_chain_sums_train_and_eval_share_nothing_whatever_the_seed():
    train = {row["prompt"] for row in rows(max_terms=3, size=1000)}
    held_out = {row["prompt"] for seed in range(3) for row in rows(split="eval", max_terms=3, seed=seed)}
    assert not train & held_out
    assert 0.05 < len(held_out) / (len(train) + len(held_out)) < 0.25


def test_chain_sums_skip_a_level_that_has_no_new_problem():
    levels = [row["terms"] for row in rows(split="eval", size=200, max_terms=4)]
    assert len(levels) == 200
    assert 0 < levels.count(2) < 30


def test_chain_sums_end_where_every_level_is_used_up():
    assert 0 < len(rows(split="eval", size=100, max_terms=2)) < 30


def test_chain_sums_keep_every_partial_sum_in_range():
    for row in rows(max_total=9):
        totals = [int(step.split("=")[1]) for step in row["solution"].split(";")[:-1]]
        assert all(0 <= total <= 9 for total in totals)


def test_chain_sums_draw_levels_evenly():
    levels = [row["terms"] for row in rows(size=1000, min_terms=5)]
    assert all(200 < levels.count(level) < 300 for level in (5, 6, 7, 8))


def test_chain_sums_stay_in_the_alphabet():
    assert set("".join(row["prompt"] + row["solution"] for row in rows(error_rate=0.5))) <= set(ALPHABET)


def test_chain_sums_without_errors_are_worked_out_right():
    assert all(row["solution"] == correct_chain(row["prompt"]) for row in rows())


def test_chain_sums_errors_leave_problem_and_answer_alone():
    flawed, right = rows(error_rate=0.3), rows()
    assert [(row["prompt"], row["answer"]) for row in flawed] == [(row["prompt"], row["answer"]) for row in right]


def test_chain_sums_error_rate_is_per_step_and_the_chain_goes_on_from_the_wrong_value():
    wrong = steps = 0
    for row in rows(size=1000, error_rate=0.12):
        *chain, answer = row["solution"].split(";")
        before = int(row["prompt"][0])
        for step in chain:
            problem, result = step.split("=")
            assert problem.startswith(str(before)) and problem[len(str(before))] in "+-"
            error = abs(int(result) - sum_of(problem))
            assert error <= 3
            wrong, steps, before = wrong + (error > 0), steps + 1, int(result)
        assert answer == f"#{before}"
    assert 0.09 < wrong / steps < 0.14


def sum_of(problem):
    sign = problem.rindex("+" if "+" in problem else "-")
    return int(problem[:sign]) + int(problem[sign:])


def test_correct_chain_matches_the_worked_example():
    assert correct_chain("7-0+6-3=") == "7-0=7;7+6=13;13-3=10;#10"
    assert correct_answer("7-0+6-3=") == "10"


@pytest.mark.parametrize("prompt", ["", "7=", "17+2=", "1+1", "1*2=", "What is 1+1?"])
def test_correct_chain_refuses_what_is_no_chain(prompt):
    with pytest.raises(ValueError, match="must look like"):
        correct_chain(prompt)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "test"}, "split must be"),
        ({"min_terms": 1}, "min_terms <= max_terms"),
        ({"min_terms": 9}, "min_terms <= max_terms"),
        ({"max_total": 0}, "max_total"),
        ({"error_rate": 1.0}, "error_rate"),
    ],
)
def test_chain_sums_name_a_wrong_argument(wrong, message):
    with pytest.raises(RunError, match=message):
        rows(**wrong)
