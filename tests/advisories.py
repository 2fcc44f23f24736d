"""make advisories: known weaknesses of the installed packages, by pip-audit, where a database of them is reachable.

Exit codes: 0, none is known; 1, some are, one a line; 3, nothing could be asked, which is said.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

# Seconds for all packages.
PATIENCE = 300


def known(audit: dict[str, Any]) -> list[str]:
    """A line for each weakness in pip-audit's JSON."""
    return [
        f"{package['name']} {package['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version'}"
        for package in audit["dependencies"]
        for found in package.get("vulns", ())
    ]


def asked() -> dict[str, Any]:
    """pip-audit's answer for this environment, from one of its own. Raises RuntimeError where there is none."""
    uvx = Path(sys.executable).parent / "uvx"
    ask = [
        uvx,
        "pip-audit",
        "--path",
        sysconfig.get_path("purelib"),
        "--format",
        "json",
        "--progress-spinner",
        "off",
    ]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(str(error)) from None
    try:
        # It exits with 1 where there are some, too.
        return json.loads(done.stdout)
    except ValueError:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no answer"])[-1]) from None


def main() -> int:
    try:
        found = known(asked())
    except RuntimeError as error:
        print(f"no advisories were looked up, as no database of them is reachable from here ({error})")
        return 3
    print("\n".join(found) or "no advisory is known for what is installed")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
