#!/usr/bin/env python3
"""Trains four small MoE language models, one for each kind of router, and tries every rule on them.

The text is Python's own standard library, byte by byte, and the descriptions of installed packages;
nothing is downloaded. It needs torch and transformers (the `oracle` dependency group), which
`scripts/test.sh` installs:

    .venv-test/bin/python scripts/study/study.py study-output          # half an hour
    .venv-test/bin/python scripts/study/study.py quick-output --quick  # a smoke test

Models and results that are already in the folder are not made again. The tables go to stdout and to
`study.md` in the folder, the figure to `study.svg`; `--docs docs` renews those of the repo. Other
versions of Python or of the packages have other texts, and give other numbers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from models import STEPS, STUDIES, train
from page import figure, page
from texts import EVALUATED, texts
from trials import try_rules


def main() -> None:
    """Train the missing models, try every rule and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke test of some minutes")
    parser.add_argument("--docs", type=Path, help="another folder for study.md and study.svg")
    arguments = parser.parse_args()
    quick = arguments.quick
    steps, pieces = (20, 16) if quick else (STEPS, EVALUATED)
    folder = arguments.folder / f"{steps}-steps"  # one folder for each length of training
    folder.mkdir(parents=True, exist_ok=True)
    text = texts(pieces)
    everything = []
    for name, study in STUDIES.items():
        if not (folder / name).exists():
            train(name, study, text.train, steps, folder / name)
        counts = (study.tried[0], study.tried[-1]) if quick else study.tried
        everything.append(try_rules(name, counts, text, folder))
    tables = page(everything, steps, pieces)
    print(tables)
    docs = arguments.docs or arguments.folder
    (docs / "study.md").write_text(tables, encoding="utf-8")
    (docs / "study.svg").write_text(figure(everything), encoding="utf-8")


if __name__ == "__main__":
    main()
