"""What the wheel contains: the package alone."""

import zipfile
from pathlib import Path

from hatchling.builders.wheel import WheelBuilder

from adafactor_compiled import __version__

ROOT = Path(__file__).resolve().parents[1]


def test_wheel_contains_the_package_alone(tmp_path):
    [path] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    info = f"adafactor_compiled-{__version__}.dist-info"
    package = ROOT / "adafactor_compiled"
    sources = {str(source.relative_to(ROOT)) for source in package.rglob("*.py")}
    assert {name for name in names if not name.startswith(info)} == sources | {
        "adafactor_compiled/py.typed",
        "adafactor_compiled/CHANGELOG.md",
        "adafactor_compiled/_fused/cpu/step.cpp",
    }
    assert f"{info}/licenses/LICENSE" in names


def test_changelog_has_this_version():
    changelog = (ROOT / "adafactor_compiled" / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {__version__} " in changelog
