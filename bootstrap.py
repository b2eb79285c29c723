"""Set up and run: `python3 bootstrap.py demo` or `python3 bootstrap.py test`, on a machine with Python alone.

It makes a virtual environment in .venv beside this file, installs the package into it, and runs the command there.
"""

import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
COMMANDS = {"demo": ["-m", "carve.cli", "demo"], "test": ["-m", "pytest"]}
EXTRAS = {"demo": "train,eval", "test": "dev"}


def main() -> int:
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        print(f"bootstrap: Python is {sys.version.split()[0]}, expected 3.10 to 3.13", file=sys.stderr)
        return 2
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        print("usage: python3 bootstrap.py demo | test [arguments]", file=sys.stderr)
        return 2
    command, *arguments = sys.argv[1:]
    if not PYTHON.exists():
        print(f"making a virtual environment in {ENVIRONMENT}", flush=True)
        venv.create(ENVIRONMENT, with_pip=True)
    print("installing (the first time downloads a few hundred megabytes)", flush=True)
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    install += ["--constraint", ROOT / "constraints.txt", "--editable", f"{ROOT}[{EXTRAS[command]}]"]
    installed = subprocess.run(install, check=False).returncode
    if installed:
        return installed
    return subprocess.run([PYTHON, *COMMANDS[command], *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
