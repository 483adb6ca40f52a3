"""Runs the benchmarks and writes RESULTS.md.

    python benchmarks/run_all.py                    # all of them: two and a half hours
    python benchmarks/run_all.py --quick            # all of them, in half an hour
    python benchmarks/run_all.py memory scaling     # these

Each script prints a section of RESULTS.md with ``--markdown``. Text below a section's end mark stays.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
END = "<!-- What the script prints ends here. -->"
# In the order of RESULTS.md; and those that draw, with where to.
PICTURES = {
    "loop_overhead": "docs/loop_overhead.png",
    "streams": None,
    "validation": None,
    "first_call": "docs/first_call.png",
    "memory": "docs/memory.png",
    "failures": None,
    "many_fits": "docs/many_fits.png",
    "scaling": "docs/scaling.png",
    "cutest": "docs/cutest.png",
    "endings": None,
    "scales": None,
    "calls": None,
    "auto_training": None,
    "lr_finders": None,
    "cyclical": None,
    "bounds": None,
}


def replaced(results: str, name: str, printed: str) -> str:
    """The results with the newly printed section of this script; a new section goes to the end."""
    section = f"{printed.strip()}\n\n{END}\n"
    old = re.search(rf"^## {name}\n.*?(?:{re.escape(END)}\n|(?=^## )|\Z)", results, re.DOTALL | re.MULTILINE)
    if old is None:
        return f"{results.rstrip()}\n\n{section}"
    rest = results[old.end() :]
    return results[: old.start()] + section + ("\n" if rest.startswith("## ") else "") + rest


def main() -> None:
    """Run the scripts one after the other, each in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller sizes")
    parser.add_argument("scripts", nargs="*", metavar="script", help=f"one of {', '.join(PICTURES)}; all by default")
    options = parser.parse_args()
    if unknown := set(options.scripts) - set(PICTURES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")

    for name in options.scripts or PICTURES:
        command = [sys.executable, str(HERE / f"{name}.py"), "--markdown"]
        command += ["--quick"] * options.quick
        # A quick run draws nothing: the pictures are of the full ones.
        command += ["--picture", PICTURES[name]] if PICTURES[name] and not options.quick else []
        print(" ".join(command), file=sys.stderr, flush=True)
        run = subprocess.run(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        print(run.stdout, flush=True)
        RESULTS.write_text(replaced(RESULTS.read_text(), name, run.stdout))


if __name__ == "__main__":
    main()
