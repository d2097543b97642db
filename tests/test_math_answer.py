r"""Case tables of `math_answer` and `choice_letter`. Each pair is asked both ways round: equality has no side."""

import pytest
from test_rewards import rollout

from rewards._answers import equal
from rewards._symbolic import same_expression
from rewards.choice_letter import choice_letter
from rewards.math_answer import math_answer

SAME = [
    (r"\frac{1}{2}", r"0.5"),
    (r"\frac12", r"1/2"),
    (r"\dfrac{3}{4}", r"0.75"),
    (r"1,000", r"1000"),
    (r"1{,}000", r"1000"),
    (r"50\%", r"0.5"),
    (r"50\%", r"50"),
    (r"5\text{ cm}", r"5"),
    (r"5 cm", r"5\text{cm}"),
    (r"x=5", r"5"),
    (r"x=5", r"x = 5"),
    (r"\{1,2\}", r"\{2,1\}"),
    (r"1,2", r"2, 1"),
    (r"1 and 2", r"1,2"),
    (r"x=1 or x=2", r"1,2"),
    (r"[0,\infty)", r"[0, \infty)"),
    (r"(-\infty,1)\cup(2,3)", r"(2,3)\cup(-\infty,1)"),
    (r"2\times10^3", r"2000"),
    (r"2e3", r"2000"),
    (r"1.5\times 10^{-3}", r"0.0015"),
    (r"-0", r"0"),
    (r"+5", r"5"),
    (r"0.50", r".5"),
    (r"\text{Evelyn}", r"evelyn"),
    (r"(C)", r"C"),
    (r"\text{(C)}", r"C"),
    (r"\boxed{7}", r"7"),
    (r"$7$", r"7"),
    (r"90^\circ", r"90"),
    (r"90°", r"90 degrees"),
    (r"1\frac{1}{2}", r"1.5"),
    (r"1 1/2", r"3/2"),
    (r"\$1,000", r"1000"),
    (r"$5", r"5 dollars"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"1\pm\sqrt{2}", r"1+\sqrt{2},1-\sqrt{2}"),
    (r"\pi/4", r"\frac{\pi}{4}"),
    (r"y=2x+1", r"2x+1"),
    (r"(1,2)", r"(1, 2)"),
    (r"(\frac12, 3)", r"(0.5,3)"),
    (r"x>2", r"(2,\infty)"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\frac{-1}{2}", r"-\frac{1}{2}"),
    (r"-\frac12", r"-0.5"),
    (r"5.", r"5"),
    (r"x \in [1,2]", r"[1,2]"),
    (r"10!", r"3628800"),
    (r"{1,2}", r"\{1,2\}"),
    (r"100,200,300", r"100, 200, 300"),
    (r"3 \text{ and } 4", r"3,4"),
    (r"\left(1,2\right)", r"(1,2)"),
    (r"5 apples", r"5 apple"),
    (r"f(x)=x^2", r"x^2"),
    (r"2^{10}", r"1024"),
    (r"10^{-2}", r"0.01"),
    (r"\frac{1}{3}", r"0.\overline{3}"),
    (r"12\%", r"\frac{3}{25}"),
    (r"A", r"\text{A}"),
    (r"\text{Yes}", r"yes"),
    (r"3:2", r"3:2"),
    (r"\emptyset", r"\varnothing"),
    (r"1-i", r"-i+1"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    (r"\log_2 8", r"3"),
    (r"a+b", r"b+a"),
    (r"2\pi", r"6.283185307179586"),
    (r"$3.50", r"3.5"),
    (r"11:30", r"11:30"),
    (r"5\text{ m/s}", r"5 m/s"),
    (r"\text{5 cm}^2", r"5 cm^2"),
    (r"-x+1", r"1-x"),
]
DIFFERENT = [
    (r"\frac13", r"0.333"),
    (r"\frac{1}{3}", r"0.333333"),
    (r"\sqrt{2}", r"1.414214"),
    (r"(1,2)", r"[1,2]"),
    (r"(1,2)", r"(2,1)"),
    (r"(1,2)", r"\{1,2\}"),
    (r"(1,2)", r"1,2"),
    (r"5 cm", r"5 m"),
    (r"5x", r"5"),
    (r"5", r"-5"),
    (r"1,2", r"1,2,3"),
    (r"1,2", r"1"),
    (r"x=5", r"y=5"),
    (r"A", r"B"),
    (r"A", r"a"),
    (r"5 (not 6)", r"5"),
    (r"5 or 6", r"5"),
    (r"72", r"7,2"),
    (r"0.5", r"50"),
    (r"1e3", r"100"),
    (r"\pi", r"3.14"),
    (r"\{1\}", r"\{1,1\}"),
    (r"x^2", r"x^3"),
    (r"Evelyn", r"Eve"),
    (r"", r"5"),
    (r"5", r""),
    (r"\infty", r"-\infty"),
    (r"9^{9^{9^{9}}}", r"5"),
    (r"1/0", r"5"),
    (r"1000", r"1,00"),
    (r"$", r"5"),
    (r"5%", r"5 cm"),
    (r"x>2", r"x\ge 2"),
    (r"x>2", r"[2,\infty)"),
    (r"3:2", r"2:3"),
    (r"nan", r"nan1"),
    (r"\text{any}", r"5"),
    (r"5^{99999}", r"5"),
    (r"a", r"b"),
    (r"2", r"2i"),
    (r"10", r"1 0"),
    (r"\boxed{}", r"5"),
    (r"\text{not } 5", r"5"),
    (r"5 + 0x", r"4"),
    (r"1", r"True"),
    (r"11:30", r"11.5"),
    (r"3!", r"3"),
    (r"5\text{ or }6", r"6"),
    (r"100,200", r"100"),
    (r"5 5", r"5"),
    (r"0", r"\emptyset"),
    (r"1", r"x=2"),
    (r"x", r"5"),
    (r"x", r"y=x^2"),
]

ANSWERS = [
    (r"So it is \boxed{\frac{1}{2}}.", "0.5", 1.0),
    (r"\boxed{\boxed{72}}", "72", 1.0),
    (r"\boxed{72} cm", "72", 1.0),
    (r"\boxed{71} no: \boxed{72}", "72", 1.0),
    (r"\boxed{72} no: \boxed{71}", "72", 0.0),
    ("The answer is 72. I checked it twice.", "72", 1.0),
    ("The final answer is: **72**", "72", 1.0),
    ("6 * 12 = 72\n#### 72 pens", "72", 1.0),
    ("#### 1,234", "1234", 1.0),
    (r"Therefore the answer is $\{1, 2\}$.", "1, 2", 1.0),
    ("The answer is 3.5 metres, so we are done", "3.5", 1.0),
    (r"\boxed{72", "72", 0.0),
    (r"The answer is 72. \boxed{", "72", 0.0),
    ("72", "72", 0.0),
    ("1 2 3 ... 71 72 73", "72", 0.0),
    ("The answer is 71 or 72.", "72", 0.0),
    ("The answer is not 72.", "72", 0.0),
    (r"\boxed{71, 72}", "72", 0.0),
    (r"\boxed{72 \text{ or } 73}", "72", 0.0),
    (r"\boxed{x}", "72", 0.0),
    (r"\boxed{\text{the answer}}", "72", 0.0),
    (r"\boxed{\text{72 or any other number}}", "72", 0.0),
    (r"\boxed{9^{9^{9^{9}}}}", "72", 0.0),
    (r"\boxed{((((((((((10!)!)!)!)!)!)!)!)!)!}", "72", 0.0),
    (r"\boxed{" + "(" * 5000 + "}", "72", 0.0),
    (r"\boxed{" + "9" * 100_000 + "}", "72", 0.0),
    ("", "72", 0.0),
    (r"\boxed{}", "72", 0.0),
    (r"\boxed{ }", " ", 0.0),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_equal_answers_are_equal_both_ways_round(one, other):
    assert equal(one, other, same_expression) and equal(other, one, same_expression)


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_different_answers_are_different_both_ways_round(one, other):
    assert not equal(one, other, same_expression) and not equal(other, one, same_expression)


@pytest.mark.parametrize(("text", "answer", "reward"), ANSWERS)
def test_math_answer_table(text, answer, reward):
    assert math_answer(rollout(text, answer)).value == reward


def test_math_answer_says_where_it_found_nothing():
    assert math_answer(rollout("72", "72")).unparsable
    assert math_answer(rollout("The answer is 72.", "72"), where="boxed").unparsable
    assert not math_answer(rollout(r"\boxed{71}", "72")).unparsable


def test_math_answer_refuses_tasks_without_an_answer():
    with pytest.raises(ValueError, match="tasks with an answer"):
        math_answer(rollout("1", None))


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        (r"\boxed{B}", 1.0),
        (r"\boxed{(B)}", 1.0),
        (r"\boxed{\text{B}}", 1.0),
        ("The answer is B.", 1.0),
        ("The answer is (B) seven.", 1.0),
        ("the correct answer is b", 1.0),
        ("Answer: B", 1.0),
        ("#### B", 1.0),
        ("B", 1.0),
        (" (B) ", 1.0),
        ("A, then B. The answer is B: seven", 1.0),
        ("The answer is A.", 0.0),
        ("The answer is A or B.", 0.0),
        (r"\boxed{A, B}", 0.0),
        (r"\boxed{AB}", 0.0),
        ("ABCDE", 0.0),
        ("The answer is Boston.", 0.0),
        ("I like B best", 0.0),
        ("The answer is B. No: the answer is C.", 0.0),
        ("The answer is F.", 0.0),
        ("", 0.0),
    ],
)
def test_choice_letter_table(text, reward):
    assert choice_letter(rollout(text, "(B)")).value == reward


def test_choice_letter_refuses_tasks_without_a_letter():
    with pytest.raises(ValueError, match="letter of ABCDE"):
        choice_letter(rollout("B", "seven"))
