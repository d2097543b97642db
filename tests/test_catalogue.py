"""`rlpost algorithms`: complete and readable in every width, and a section that can be pasted."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rlpost.__main__ import main
from rlpost.algorithms import ADVANTAGES, ALGORITHMS, CORRECTIONS, LENGTHS, LOSSES
from rlpost.catalogue import print_catalogue, section
from rlpost.recipe import load

ROOT = Path(__file__).parent.parent
PLAIN = "tasks: {train: a.jsonl}\n"


def printed(width):
    stream = io.StringIO()
    print_catalogue(Console(file=stream, width=width))
    return stream.getvalue()


def squeezed(text):
    """Without what wrapping and columns put between the characters."""
    return "".join(text.split())


@pytest.mark.parametrize("width", [80, 120])
def test_the_catalogue_fits_the_terminal_and_cuts_nothing_off(width):
    text = printed(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text and "\x1b" not in text
    for name in (*ALGORITHMS, *ADVANTAGES, *LOSSES, *CORRECTIONS, *LENGTHS):
        assert any(line.startswith(f" {name} ") for line in text.splitlines()), name


def test_the_catalogue_says_all_that_the_table_holds():
    text = squeezed(printed(1000))
    for bundle in ALGORITHMS.values():
        assert squeezed(bundle.summary) in text and squeezed(bundle.paper) in text
        for part in ("advantage", "loss"):
            assert part + bundle.section[part]["use"] in text
    for pieces in (ADVANTAGES, LOSSES, CORRECTIONS, LENGTHS):
        for piece in pieces.values():
            assert squeezed(piece.summary) in text
            assert all(f"{key}={str(value).lower()}" in text for key, value in piece.parameters.items())


def test_a_row_holds_what_its_bundle_is_made_of():
    rows = printed(1000).split("algorithm.advantage.use")[0]
    (row,) = (block for block in rows.split("\n reinforce_pp ")[1:])
    made_of = ("advantage reinforce_pp", "loss ppo_clip", "aggregation token_mean", "KL 0.001, k1 in the reward")
    assert all(part in row.split("\n prorl_v2 ")[0] for part in (*made_of, "groups keep"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_printed_section_can_be_pasted_into_a_recipe(tmp_path, capsys, name):
    assert main(["algorithms", name]) == 0
    text = capsys.readouterr().out
    assert max(len(line) for line in text.splitlines()) <= 100
    (tmp_path / "run.yaml").write_text(PLAIN + text)
    pasted = load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(PLAIN)
    assert pasted == load(tmp_path / "run.yaml", [f"algorithm.name={name}"])
    bundle = ALGORITHMS[name]
    said = squeezed(text.replace("#", ""))
    assert all(squeezed(what) in said for what in (bundle.summary, bundle.paper, bundle.conflicts))


def test_a_section_says_what_chooses_the_tasks_where_that_is_not_uniform():
    assert "# curriculum: scalerl, where the recipe names none\n" in section("scalerl")
    assert "curriculum" not in section("grpo")


def test_a_section_holds_the_bundles_values():
    assert yaml.safe_load(section("prorl_v2"))["algorithm"] == {"name": "prorl_v2", **ALGORITHMS["prorl_v2"].section}


def test_an_unknown_name_is_one_message_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["algorithms", "gspoo"])
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines()[-1].endswith(
        f"must be one of {', '.join(ALGORITHMS)} (got 'gspoo'), did you mean `gspo`?"
    )


def test_the_command_starts_without_heavy_libraries_and_prints_plainly_into_a_pipe():
    code = "import sys; from rlpost.__main__ import main; main(['algorithms']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "\x1b" not in done.stdout and max(len(line) for line in done.stdout.splitlines()) <= 80
