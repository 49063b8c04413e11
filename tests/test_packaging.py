"""What is installed: the wheel holds the library alone, has its metadata, and is typed."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lit_fanions
from tests.conftest import TESTS, subprocess_environment

ROOT = TESTS.parent


def run(*args: object, **options: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, args)], capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_metadata_has_the_version_and_the_extras():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lit_fanions.__version__
    extras = project["optional-dependencies"]
    assert {"sweep", "cuda12", "cuda13", "zoo", "dev"} <= set(extras)
    assert set(extras["sweep"]) <= set(extras["dev"])


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("tool", ["mypy", "pyright"])
def test_typed_example_passes(tool):
    pytest.importorskip(tool)
    options = {
        # torch's own backward is not typed.
        "mypy": ["--strict", "--allow-untyped-calls", "--follow-imports=silent"],
        "pyright": ["--pythonpath", sys.executable],
    }
    run("-m", tool, *options[tool], ROOT / "examples" / "typed.py", cwd=ROOT)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the wheel and the source distribution of the tracked files."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("built")
    tracked = subprocess.run(
        ["git", "-C", ROOT, "archive", "HEAD"], capture_output=True, check=False
    ).stdout
    if not tracked:
        pytest.skip("no git checkout")
    (folder / "source.tar").write_bytes(tracked)
    shutil.unpack_archive(folder / "source.tar", folder / "source")
    run("-m", "build", "--outdir", folder / "dist", folder / "source", timeout=300)
    return folder / "dist"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wheel_holds_the_library_alone(built):
    (wheel,) = built.glob("*.whl")
    names = {Path(name).parts[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert names == {"lit_fanions", f"lit_fanions-{lit_fanions.__version__}.dist-info"}
    files = zipfile.ZipFile(wheel).namelist()
    assert "lit_fanions/py.typed" in files
    assert any(name.endswith("licenses/LICENSE") for name in files)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_distributions_pass_the_checks_of_the_index(built):
    for tool in ("twine", "check_wheel_contents"):
        pytest.importorskip(tool)
    run("-m", "twine", "check", "--strict", *built.iterdir())
    run("-m", "check_wheel_contents", *built.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_installed_wheel_works_in_another_project(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:  # a wheel of Python files alone is installed so
        archive.extractall(tmp_path / "site")
    environment = {**subprocess_environment(), "PYTHONPATH": str(tmp_path / "site")}
    options = {"cwd": tmp_path, "env": environment, "timeout": 100}
    place = run("-c", "import lit_fanions; print(lit_fanions.__file__)", **options)
    assert Path(place.strip()).is_relative_to(tmp_path)
    run("-m", "lit_fanions", "export", "--algorithm", "muon", "--output", "muon.py", **options)
    assert "f_muon" in run("-m", "lit_fanions", "list", "algorithms", **options)
    run(ROOT / "examples" / "typed.py", **options)
