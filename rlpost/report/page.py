"""The page as one file: template, style, script and data, with nothing to load."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlpost.report.rollouts import compressed

HERE = Path(__file__).parent
SCRIPTS = ("charts.js", "rollouts.js", "page.js")


def render(title: str, data: Mapping[str, Any], rollouts: Sequence[Sequence[str]]) -> str:
    """The page; `rollouts` has the compressed parts of each run.

    Data goes in as base64, in which no text of a model can end a script; the policy in the head allows this page's own
    script and style by their hashes and nothing else.
    """
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (
        '"use strict";\n(() => {\n'
        + "\n".join((HERE / name).read_text(encoding="utf-8") for name in SCRIPTS)
        + "})();\n"
    )
    blocks = [("data", compressed(data))]
    blocks += [(f"rollouts-{run}-{i}", part) for run, parts in enumerate(rollouts) for i, part in enumerate(parts)]
    filled = {
        "TITLE": html.escape(title),
        "STYLE": style,
        "STYLE_HASH": digest(style),
        "SCRIPT": script,
        "SCRIPT_HASH": digest(script),
        "VERSION": html.escape(own_version()),
        "DATA": "\n".join(f'<script type="text/plain" id="{name}">{text}</script>' for name, text in blocks),
    }
    pieces = (HERE / "page.html").read_text(encoding="utf-8").split("@@")
    return "".join(filled[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def digest(text: str) -> str:
    """As a content security policy names a script or a style."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def own_version() -> str:
    """Of this package."""
    try:
        return version("rlpost")
    except PackageNotFoundError:
        return ""
