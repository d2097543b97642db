"""`rlpost audit`: how many of the answers that were judged right are not, by a sample that a person or a model marks.

Answers with a suspicious sign (`suspicion.py`) and answers without one are sampled apart, so that rare ones are seen;
the shares are put together again by how many there are of each.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlpost.errors import RunError
from rlpost.evaluation.answers import ANSWERS, read_answers
from rlpost.evaluation.suspicion import flags_of
from rlpost.manifest import write_json
from rlpost.report.intervals import wilson

AUDIT, PAGE = "audit.json", "audit.html"
VERDICTS = {
    "sound": "the steps lead to the answer, which is right",
    "unsound": "the answer is right, and the steps do not lead to it",
    "wrong": "the answer is not right: the reward was mistaken",
    "unsure": "cannot say",
}
BAD = ("unsound", "wrong")


def make_audit(folder: Path, *, num: int, seed: int = 0) -> dict[str, Any]:
    """Draw `num` answers judged right, half of them suspicious where there are so many, and write the form."""
    lines = read_answers(folder)
    if not lines:
        raise RunError(f"{folder} must hold {ANSWERS} of `rlpost eval ... --out {folder}` (it has none)")
    strata: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        for i, answer in enumerate(line["answers"]):
            if answer["passed"]:
                flags = flags_of(answer)
                stratum = f"{line['set']}: {'suspicious' if flags else 'not suspicious'}"
                strata.setdefault(stratum, []).append(_item(line, i, answer, stratum, flags))
    if not strata:
        raise RunError(f"{folder} must hold an answer that was judged right (none of {len(lines)} problems has one)")
    dice = random.Random(f"audit {seed}")
    counts = shares_of(num, {name: len(items) for name, items in strata.items()})
    items = [item for name, found in strata.items() for item in dice.sample(found, counts[name])]
    dice.shuffle(items)  # a reader is not to know what comes next
    audit = {"strata": {name: len(found) for name, found in strata.items()}, "verdicts": VERDICTS, "items": items}
    write_json(folder / AUDIT, audit)
    (folder / PAGE).write_text(page_of(audit), encoding="utf-8")
    return audit


def read_audit(folder: Path) -> dict[str, Any]:
    """The sample that `make_audit` has drawn."""
    file = folder / AUDIT
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} must be what `rlpost audit {folder}` writes ({error}): run that first") from None


def read_marks(file: Path, audit: Mapping[str, Any]) -> dict[str, str]:
    """Verdicts by id; a later line for the same answer counts."""
    known = {item["id"] for item in audit["items"]}
    marks: dict[str, str] = {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        for row in rows:
            if row["id"] not in known or row["verdict"] not in VERDICTS:
                raise RunError(
                    f"--marks: every line of {file} must have the `id` of an answer of {AUDIT} and a `verdict` that is "
                    f"one of {', '.join(VERDICTS)} (got {row['id']!r}, {row['verdict']!r}): was the sample drawn anew?"
                )
            marks[row["id"]] = row["verdict"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        wanted = "a JSON object with `id` and `verdict` in every line"
        raise RunError(f"--marks: {file} must have {wanted} ({error}): give the file that the form has saved") from None
    return marks


def rates(audit: Mapping[str, Any], marks: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Of each data set: the share of answers judged right that are `unsound` or `wrong`, with 95 %.

    p = sum over strata of (N_s / N) p_s. The interval puts Wilson's of each stratum together: MOVER, Zou and Donner,
    doi:10.1002/sim.3095. Answers marked `unsure`, or not at all, count nowhere.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(stratum.rpartition(": ")[0] for stratum in audit["strata"]):
        sizes = {key: size for key, size in audit["strata"].items() if key.rpartition(": ")[0] == name}
        parts = {key: _judged(audit, marks, key) for key in sizes}
        row: dict[str, Any] = {"passed": sum(sizes.values()), "strata": {}}
        for key, judged in parts.items():
            said = {"answers": sizes[key], "marked": len(judged)} | {one: judged.count(one) for one in BAD}
            row["strata"][key.rpartition(": ")[2]] = said
        found[name] = row | {f"{bad}_frac": _pooled(sizes, parts, (bad,)) for bad in BAD}
        found[name]["false_positive_frac"] = _pooled(sizes, parts, BAD)
    return found


def shares_of(num: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """How many to draw of each stratum: equally many, and what one cannot give is given by the others.

    >>> shares_of(10, {"a": 2, "b": 50, "c": 50})
    {'a': 2, 'b': 4, 'c': 4}
    """
    counts, left = {}, num
    for place, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
        counts[name] = min(sizes[name], left // (len(sizes) - place))
        left -= counts[name]
    return {name: counts[name] for name in sizes}


def page_of(audit: Mapping[str, Any]) -> str:
    """The form as one HTML file that loads nothing; what a model wrote is data in it, and never markup."""
    frame = (Path(__file__).parent / "audit.html").read_text(encoding="utf-8")
    data = json.dumps(audit, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    return frame.replace("/*AUDIT*/null", data)


def _item(
    line: Mapping[str, Any], i: int, answer: Mapping[str, Any], stratum: str, flags: Sequence[str]
) -> dict[str, Any]:
    prompt = line["prompt"] if isinstance(line["prompt"], str) else line["prompt"][-1]["content"]
    told = {"id": f"{line['set']}/{line['place']}/{i}", "stratum": stratum, "flags": list(flags), "prompt": prompt}
    return told | {"answer": line["answer"], "solution": line["solution"], "text": answer["text"]}


def _judged(audit: Mapping[str, Any], marks: Mapping[str, str], stratum: str) -> list[str]:
    said = [marks.get(item["id"], "unsure") for item in audit["items"] if item["stratum"] == stratum]
    return [verdict for verdict in said if verdict != "unsure"]


def _pooled(sizes: Mapping[str, int], parts: Mapping[str, Sequence[str]], bad: Sequence[str]) -> list[float] | None:
    """[share, low, high]; None where a stratum with answers has no mark."""
    if any(not judged for judged in parts.values()):
        return None
    whole = sum(sizes.values())
    share, below, above = 0.0, 0.0, 0.0
    for key, judged in parts.items():
        weight, p = sizes[key] / whole, sum(verdict in bad for verdict in judged) / len(judged)
        low, high = (p, p) if len(judged) == sizes[key] else wilson(p, len(judged))  # all of them: nothing is left open
        share += weight * p
        below += (weight * (p - low)) ** 2
        above += (weight * (high - p)) ** 2
    return [share, max(0.0, share - math.sqrt(below)), min(1.0, share + math.sqrt(above))]
