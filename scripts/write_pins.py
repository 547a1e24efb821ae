"""Writes tests/pins/pins.json and tests/pins/texts/: what the product writes and says, so that a change is a choice.

python scripts/write_pins.py            writes them
python scripts/write_pins.py --check    exits 1 if the tests would find a difference
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PINS = ROOT / "tests" / "pins"


def main() -> int:
    parser = argparse.ArgumentParser(description="Write what the product writes and says into tests/pins.")
    parser.add_argument("--check", action="store_true", help="only say whether the pins are up to date")
    if parser.parse_args().check:
        command = ["-m", "pytest", str(PINS / "test_pins.py")]
        return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode
    sys.path.insert(0, str(ROOT))
    from tests.pins.made import ENVIRONMENT  # after the path is known

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LORACAT_", "HF_"))}
    command = ["-W", "ignore", "-m", "tests.pins.made", str(PINS)]
    variables = kept | ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
