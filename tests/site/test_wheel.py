"""The third use of the book: ``kfac_lib`` installed, in one's own code, without the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pages import ROOT

OWN_CODE = """
import importlib.abc
import sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"matplotlib", "ipywidgets", "sklearn", "PIL", "IPython"}:
            raise ModuleNotFoundError(f"{name} is not installed here", name=name)

sys.meta_path.insert(0, Absent())

import torch
from torch import nn

import kfac_lib
import kfac_lib.interactive  # may be imported, not used

torch.manual_seed(0)
N, D_in, D_out = 7, 3, 2
layer = nn.Linear(D_in, D_out, bias=False, dtype=torch.float64)
X = torch.randn(N, D_in, dtype=torch.float64)
y = torch.randn(N, D_out, dtype=torch.float64)
kfac = kfac_lib.KFAC.compute(layer, nn.MSELoss(), (X, y))

# by hand: the mean squared error of one linear layer has the Hessian 2/(N D_out) X'X (x) I,
# and for one linear layer KFAC is exact
A = X.T @ X / N
B = 2 / D_out * torch.eye(D_out, dtype=torch.float64)
assert torch.allclose(kfac[""].to_dense("cvec"), torch.kron(A, B), rtol=1e-12, atol=1e-14)
assert torch.allclose(kfac[""].to_dense("rvec"), torch.kron(B, A), rtol=1e-12, atol=1e-14)
print(kfac_lib.__file__)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder outside the repository with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    done = subprocess.run([*build, str(ROOT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    target = folder / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, capture_output=True)
    return target


def test_the_installed_library_computes_kfac_without_the_books_packages(installed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OWN_CODE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(installed))


def test_the_wheel_holds_the_library_alone(installed):
    tops = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert tops == {"kfac_lib"}
    assert (installed / "kfac_lib" / "py.typed").is_file()
