"""Freeze the exact set of packages: install requirements.txt into an empty environment, list it.

Other KFAC libraries go to a file of their own, to be installed without their dependencies (see its
head).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PEERS = {
    "backpack-for-pytorch", "curvlinops-for-pytorch", "einconv", "linear_operator", "nngeometry",
    "opt_einsum", "unfoldnd",
}  # fmt: skip
# torchvision is asked for by the peers and never used; its builds must match those of torch
UNUSED = {"torchvision"}
HEAD = """\
# The exact set that every command installs. Made from requirements.txt by `make lock`.
# Other KFAC libraries are in requirements-peers.lock.
"""
PEERS_HEAD = """\
# Other KFAC libraries, for chapter 10, its tests and `make bench`. Installed with --no-deps: they
# declare torchvision, which nothing here imports, and whose builds must match the build of torch.
"""


def freeze() -> list[str]:
    """The pins of an environment with everything that requirements.txt asks for."""
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        pip = [f"{scratch}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "-r", ROOT / "requirements.txt"], check=True)
        out = subprocess.run([*pip, "freeze"], check=True, capture_output=True, text=True).stdout
    lines = (re.sub(r"\+\w+$", "", line) for line in out.splitlines())
    return [line for line in lines if "==" in line]


def main() -> None:
    """Write both lock files."""
    pins = {line.split("==")[0].lower(): line for line in freeze()}
    own = [line for name, line in pins.items() if name not in PEERS | UNUSED]
    peers = [line for name, line in pins.items() if name in PEERS]
    (ROOT / "requirements.lock").write_text(HEAD + "\n".join(own) + "\n")
    (ROOT / "requirements-peers.lock").write_text(PEERS_HEAD + "\n".join(peers) + "\n")


if __name__ == "__main__":
    main()
