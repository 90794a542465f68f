#!/usr/bin/env python3
"""Records a terminal session with the demo's checkpoint as docs/terminal.svg, for the README.

./scripts/test.sh --version          # makes .venv-test
.venv-test/bin/python scripts/picture.py
"""

from __future__ import annotations

import argparse
import io
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from demo import make_checkpoint
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PICTURE = Path(__file__).parent.parent / "docs" / "terminal.svg"
WIDTH = 92
COMMANDS = (
    "moescale ./mixtral-2 ./mixtral-3 -k 3 --dry-run",
    "moescale ./mixtral-2 ./mixtral-3 -k 3 --verify --quiet",
    "diff mixtral-2/config.json mixtral-3/config.json",
)
THEME = TerminalTheme(
    (22, 27, 34),
    (230, 237, 243),
    [
        *((0, 0, 0), (255, 123, 114), (63, 185, 80), (210, 153, 34)),
        *((88, 166, 255), (188, 140, 255), (57, 197, 207), (177, 186, 196)),
    ],
)


def main() -> None:
    """Run the commands in a temporary folder and draw their output."""
    argparse.ArgumentParser(description=main.__doc__).parse_args()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "mixtral-2")
        for command in COMMANDS:
            console.print(Text.assemble(("$ ", "bold green"), (command, "bold")))
            console.print(Text(output_of(command, folder)))
    svg = console.export_svg(title="moescale", theme=THEME, unique_id="moescale")
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(without_web_fonts(svg), encoding="utf-8")


def output_of(command: str, folder: str) -> str:
    """The output of a command on both streams, in order."""
    words = shlex.split(command)
    if words[0] == "moescale":
        words = [sys.executable, "-m", *words]
    child = subprocess.run(
        words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return child.stdout


def without_web_fonts(svg: str) -> str:
    """Remove the fonts from other hosts, which a README cannot load."""
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas")


if __name__ == "__main__":
    main()
