"""Checks constraints.txt against every Python that pyproject.toml names, from the index's metadata; installs nothing.

With all extras, each version must resolve to exactly one pin for every package, and no pin may be left over.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
# fmt: off
RESOLVE = [
    sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--all-extras",
    "--constraint", "constraints.txt", "--only-binary", ":all:", "--python-platform", "x86_64-manylinux_2_28",
    "--system-certs", "pyproject.toml", "--python-version",
]
# fmt: on


def pins_for(version: str) -> dict[str, str]:
    """The lines of constraints.txt that hold on `version` of Python, by the name of the package."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    environment = {"python_version": version, "python_full_version": f"{version}.0"}
    pins = [(line, Requirement(line)) for line in lines]
    holding = [(line, pin) for line, pin in pins if not pin.marker or pin.marker.evaluate(environment)]
    return {canonicalize_name(pin.name): line for line, pin in holding}


def main() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    versions = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    complaints = [
        f"pyproject.toml: the oldest Python of the classifiers is {versions[0]}, but not in `{setting}`"
        for setting in ("requires-python", "python_version")
        if not re.search(rf'^{setting} = "(>=)?{re.escape(versions[0])}"$', project, re.MULTILINE)
    ]
    unused = {line for version in versions for line in pins_for(version).values()}
    environment = os.environ | {"UV_PYTHON_DOWNLOADS": "never"}
    for version in versions:
        done = subprocess.run([*RESOLVE, version], cwd=ROOT, env=environment, capture_output=True, text=True)
        if "Failed to fetch" in done.stderr:
            sys.exit(f"the package index cannot be reached (UV_DEFAULT_INDEX names another): {done.stderr.strip()}")
        if done.returncode:
            complaints.append(f"Python {version}: {done.stderr.strip()}")
            continue
        pins, needed = pins_for(version), dict(line.split("==") for line in done.stdout.split())
        missing = [f"{name}=={number}" for name, number in needed.items() if name not in pins]
        if missing:
            complaints.append(f"Python {version}: constraints.txt lacks {', '.join(missing)}")
        unused -= {pins[name] for name in needed if name in pins}
        print(f"Python {version}: {len(needed)} packages")
    complaints += [f"constraints.txt: nothing needs {line}" for line in sorted(unused) if not complaints]
    if complaints:
        sys.exit("\n".join(complaints))


if __name__ == "__main__":
    main()
