"""`rlpost audit`: signs, the sample, the form, marks by a person and by a model, and the rates they give."""

from __future__ import annotations

import json
import re

import pytest
from chat_server import chat, question, server

from rlpost.__main__ import FAILED, main
from rlpost.errors import RunError
from rlpost.evaluation.answers import ANSWERS
from rlpost.evaluation.audit import make_audit, rates, read_audit, read_marks
from rlpost.evaluation.suspicion import false_equations, flags_of


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("16 - 3 - 4 = 9, and 9 * 2 = 18. #### 18", []),
        ("16 - 3 - 4 = 8", ["16 - 3 - 4 = 8"]),
        ("48/2=<<48/2=24>>24 clips", []),
        ("48/2=<<48/2=25>>24 clips", ["48/2 = 25"]),
        ("3 \u00d7 4 = 13 and 12 \u00f7 4 = 3", ["3 \u00d7 4 = 13"]),
        ("2 + 3 x 4 = 20", ["2 + 3 x 4 = 20"]),
        ("$5.50 x 2 = $11.00", []),
        ("10 / 3 = 3.33 and 100 / 3 = 33", []),
        ("3 + 4 = 7 + 1 = 8", []),
        ("(2 + 3) * 4 = 20", []),
        ("5 / 0 = 3", []),
        ("12 / 4 = 3% of it, x - 5 = 3, 2024-11-25 = today", []),
    ],
)
def test_equations_that_do_not_hold_are_found_and_others_left_alone(text, wrong):
    assert false_equations(text) == wrong


def answered(text, *, passed=True, marked=1.0, finish="stop"):
    parts = {"final_number": float(passed), "marked_answer": marked}
    return {"text": text, "passed": passed, "parts": parts, "tokens": 9, "finish": finish}


def test_flags_name_what_is_suspicious():
    assert flags_of(answered("2 + 2 = 4\n#### 4")) == flags_of(answered("The answer is 2 + 2 = 4. #### 4")) == []
    found = flags_of(answered("2 + 2 = 5. The answer is 5. #### 4", marked=0.0, finish="length"))
    assert found == ["format: marked_answer is 0", "truncated", "contradiction: 2 + 2 = 5", "several answers: 5, 4"]


@pytest.fixture
def folder(tmp_path):
    """40 answers judged right: 30 sound ones, 10 with a step that does not hold; and some that were judged wrong."""
    lines = []
    for place in range(10):
        texts = ["2 + 2 = 4\n#### 4"] * 3 + ["2 + 2 = 5</script><b>\n#### 4"]
        answers = [answered(text) for text in texts] + [answered("#### 3", passed=False)]
        lines.append({"set": "sums", "place": place, "key": str(place), "row": {}, "prompt": "2+2?", "answer": "4"})
        lines[-1] |= {"solution": None, "answers": answers}
    (tmp_path / ANSWERS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_sample_has_as_many_suspicious_answers_as_others(folder):
    audit = make_audit(folder, num=12)
    assert audit["strata"] == {"sums: not suspicious": 30, "sums: suspicious": 10}
    strata = [item["stratum"] for item in audit["items"]]
    assert strata.count("sums: suspicious") == 6 and len({item["id"] for item in audit["items"]}) == 12
    assert read_audit(folder)["items"] == audit["items"] == make_audit(folder, num=12)["items"]
    assert make_audit(folder, num=12, seed=1)["items"] != audit["items"]
    assert len(make_audit(folder, num=100)["items"]) == 40


def test_the_form_holds_what_a_model_wrote_as_data(folder):
    make_audit(folder, num=12)
    page = (folder / "audit.html").read_text()
    assert page.count("</script>") == 1 and "<b>\\n" not in page
    [data] = re.findall(r"^const audit = (.*);$", page, re.MULTILINE)
    assert json.loads(data) == read_audit(folder)


def test_rates_weigh_the_strata_by_how_many_answers_they_have(folder):
    audit = make_audit(folder, num=20)
    marks = {item["id"]: "unsound" if item["stratum"] == "sums: suspicious" else "sound" for item in audit["items"]}
    found = rates(audit, marks)["sums"]
    assert found["passed"] == 40 and found["strata"]["suspicious"] == {
        "answers": 10,
        "marked": 10,
        "unsound": 10,
        "wrong": 0,
    }
    share, low, high = found["false_positive_frac"]
    assert share == low == 0.25 and high == pytest.approx(0.25 + 0.75 * 0.2775, abs=1e-4)  # 0 of 10, of the 30 others
    assert found["wrong_frac"][0] == 0.0 and found["unsound_frac"][0] == 0.25
    whole = make_audit(folder, num=40)
    marks = {item["id"]: "unsound" if item["stratum"] == "sums: suspicious" else "sound" for item in whole["items"]}
    assert rates(whole, marks)["sums"]["false_positive_frac"] == [0.25, 0.25, 0.25]  # nothing was left to chance


def test_what_was_not_marked_counts_nowhere_and_a_stratum_without_marks_has_no_rate(folder):
    audit = make_audit(folder, num=20)
    plain = [item["id"] for item in audit["items"] if item["stratum"] == "sums: not suspicious"]
    assert rates(audit, dict.fromkeys(plain, "sound"))["sums"]["false_positive_frac"] is None
    other = next(item["id"] for item in audit["items"] if item["stratum"] == "sums: suspicious")
    said = dict.fromkeys(plain, "unsure") | {plain[0]: "sound", other: "wrong"}
    assert rates(audit, said)["sums"]["wrong_frac"][0] == 0.25


def test_marks_must_be_of_this_sample(folder):
    audit = make_audit(folder, num=4)
    file = folder / "marks.jsonl"
    first = audit["items"][0]["id"]
    file.write_text(f'{{"id": "{first}", "verdict": "sound"}}\n{{"id": "{first}", "verdict": "wrong", "note": "no"}}\n')
    assert read_marks(file, audit) == {first: "wrong"}
    for line in ('{"id": "x", "verdict": "sound"}', f'{{"id": "{first}", "verdict": "fine"}}'):
        file.write_text(line)
        with pytest.raises(RunError, match="one of sound, unsound, wrong, unsure"):
            read_marks(file, audit)
    file.write_text("no")
    with pytest.raises(RunError, match="give the file that the form has saved"):
        read_marks(file, audit)


def judge(path, body, number):
    """Calls unsound what has a false step, and wraps its verdict in words."""
    verdict = "unsound" if "2 + 2 = 5" in question(body) else "sound"
    return chat(f"VERDICT: sound?\nHm. VERDICT: **{verdict}**")


def test_a_model_marks_and_a_person_reads_the_rates(folder, capsys):
    with server(judge) as (url, _):
        assert main(["audit", str(folder), "--num", "20", "--endpoint", f"{url}/v1", "--model", "org/judge"]) == 0
    said = capsys.readouterr().out
    assert json.loads(said[said.index("{") :])["sums"]["unsound_frac"][0] == 0.25
    rows = [json.loads(line) for line in (folder / "marks-org-judge.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and {row["by"] for row in rows} == {"org/judge"}
    assert main(["audit", str(folder), "--marks", str(folder / "marks-org-judge.jsonl")]) == 0
    assert '"false_positive_frac"' in capsys.readouterr().out


def test_the_command_says_what_it_lacks(folder, tmp_path, capsys):
    assert main(["audit", str(folder)]) == 0
    assert "sums: suspicious: 10 of 10 answers" in capsys.readouterr().out
    assert main(["audit", str(folder), "--endpoint", "http://x"]) == FAILED
    assert "--endpoint and --model belong together" in capsys.readouterr().err
    assert main(["audit", str(tmp_path / "nothing")]) == FAILED
    assert f"must hold {ANSWERS}" in capsys.readouterr().err
