"""python -m app serve            run the service; WINNOW_* variables are its settings
python -m app check BUNDLE     verify a bundle and say in plain words what is wrong

Exit codes: 0, or 2 for settings that can't be used or a bundle that must not be served.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and faiss: one request, one core

import asyncio
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path

from app.bundle import Generation, load
from app.errors import BundleError
from app.main import run
from app.settings import SettingsError, from_environment
from app.warmup import prove


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = ArgumentParser("python -m app", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="run the service")
    check = commands.add_parser("check", help="verify a bundle")
    check.add_argument("bundle", type=Path)
    check.add_argument("--digest", help="SHA-256 that manifest.json must have")
    parsed = parser.parse_args(arguments)
    try:
        if parsed.command == "serve":
            return run(from_environment())
        generation = load(parsed.bundle, parsed.digest)
        asyncio.run(prove(generation))
        _report(generation)
    except (BundleError, SettingsError) as e:
        print(f"refused: {e}", file=sys.stderr)
        return 2
    return 0


def _report(g: Generation) -> None:
    m, recall, n_users = g.manifest, g.manifest.retrievers[0].recall, len(g.users.ids) if g.users else 0
    print(f"{g.name}: sound")
    print(f"  items       {g.n_items:,} x {g.d}; tables {', '.join(g.tables)}; {n_users:,} users")
    print(f"  index       {m.retrievers[0].kind}, recall@{recall.at} {recall.reached:.3f} (asked: {recall.target})")
    print(f"  widths      {m.funnel.retrieve} -> {m.funnel.rerank} -> {m.funnel.k}")
    print(f"  golden      {len(m.golden)} requests reproduced; calibrated on {m.calibration.n_requests}")
    print(f"  digest      {g.digest}")


if __name__ == "__main__":
    sys.exit(main())
