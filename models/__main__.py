"""python -m models fetch                     the example's data: MovieLens-100k
python -m models train                     fit the example's models: a folder with pack.toml
python -m models pack --config pack.toml --out BUNDLE
                                           arrays and ONNX files, anybody's, to a bundle
python -m models evaluate BUNDLE --requests FILE
                                           what the funnel loses against its own re-ranker
python -m models synthesize --items 1_000_000
                                           a made-up world of any size, packed, with requests to load it
python -m models rewidth BUNDLE --retrieve N --rerank N --out BUNDLE
                                           the same bundle at other widths, by links
python -m models hoist BUNDLE --out BUNDLE
                                           the same bundle, its re-ranker cut where that pays
python -m models quantise BUNDLE --requests FILE --out BUNDLE
                                           the same bundle, its re-ranker in eight bits where that pays
python -m models demo                      all of it, served, with one request printed

Exit codes: 0; 1 if the demo's service can't be started or asked; 2 for what can't be fetched, packed or evaluated;
with one sentence. Only train, demo and synthesize (but for --untrained) need torch, fetch and demo the network; each
command imports no more than it needs.
"""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

from app.errors import BundleError
from models.errors import Refused

DATA = Path("data")
ARTEFACTS = Path("models/artefacts/movielens-100k")
BUNDLE = Path("models/bundles/movielens-100k")
SYNTHETIC = Path("models/bundles/w1")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.run(parsed) or 0)
    except (Refused, BundleError) as e:
        print(f"refused: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells say it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, run, fill in (
        ("fetch", _fetch, _example_options),
        ("train", _train, _example_options),
        ("pack", _pack, _pack_options),
        ("evaluate", _evaluate, _evaluate_options),
        ("synthesize", _synthesize, _synthesize_options),
        ("rewidth", _rewidth, _rewidth_options),
        ("hoist", _hoist, _hoist_options),
        ("quantise", _quantise, _quantise_options),
        ("demo", _demo, _demo_options),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        fill(command)
    return parser


def _example_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data", type=Path, default=DATA, help="where the ratings are kept")
    command.add_argument("--artefacts", type=Path, default=ARTEFACTS, help="where trained models go")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--people", type=int, help="only the first so many people: quick trials")
    command.add_argument("--epochs", type=int, help="instead of the tuned numbers: quick trials")


def _pack_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", type=Path, required=True, help="pack.toml; paths in it are relative to it")
    command.add_argument("--out", type=Path, required=True, help="the bundle's directory, to be made")
    command.add_argument("--recall", type=float, default=0.95, help="wanted of the index, against exact search")
    command.add_argument(
        "--index", choices=("flat", "hnsw", "ivf_sq8", "ivf_sq4", "ivf_pq"), help="kind to begin with, not by size"
    )
    command.add_argument("--no-hoist", action="store_true", help="leave the re-ranker whole, even where a cut pays")
    command.add_argument("--int8", action="store_true", help="the re-ranker in eight bits, where that pays")
    command.add_argument("--force", action="store_true", help="replace a bundle that is there")


def _evaluate_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path)
    command.add_argument("--requests", type=Path, required=True, help="a request of POST /v1/rank a line")
    command.add_argument("--most", type=_positive, default=200, help="requests, evenly spread over the file")
    command.add_argument("--k", type=_positive, default=10, help="how many of the re-ranker's own best")
    command.add_argument("--truth", type=Path, help="of a made-up world, to judge answers by: <bundle>.truth.npz")


def _synthesize_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--items", type=int, default=1_000_000, help="1,000 or more; a million if absent")
    command.add_argument("--dim", type=int, default=64, help="of the embeddings")
    command.add_argument("--hidden", type=_units, default=(512, 256, 128), help="units of the re-ranker's layers")
    command.add_argument("--seed", type=int, default=0, help="of everything but the ids")
    command.add_argument("--recall", type=float, default=0.9, help="wanted of the index, against exact search")
    command.add_argument("--untrained", action="store_true", help="models of the same size that need no torch")
    command.add_argument("--out", type=Path, default=SYNTHETIC, help="the bundle's directory; requests go beside it")
    command.add_argument("--name", help="the bundle's; its directory's if absent")
    command.add_argument("--force", action="store_true", help="replace a bundle that is there, and what is beside it")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: allowed is a whole number, 1 or more")
    return int(text)


def _units(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def _rewidth_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path)
    command.add_argument("--retrieve", type=int, required=True, help="candidates that retrieval finds")
    command.add_argument("--rerank", type=int, required=True, help="candidates that the deep model scores")
    command.add_argument("--out", type=Path, required=True, help="the bundle's directory, to be made")
    command.add_argument("--force", action="store_true", help="replace a bundle that is there")


def _quantise_options(command: argparse.ArgumentParser) -> None:
    _hoist_options(command)
    command.add_argument("--requests", type=Path, required=True, help="200 sample requests or more, a line each")


def _hoist_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("bundle", type=Path)
    command.add_argument("--out", type=Path, required=True, help="the bundle's directory, to be made")
    command.add_argument("--force", action="store_true", help="replace a bundle that is there")


def _demo_options(command: argparse.ArgumentParser) -> None:
    _example_options(command)
    command.add_argument("--bundle", type=Path, default=BUNDLE)
    command.add_argument("--port", type=int, default=8000)
    command.add_argument("--admin-port", type=int, default=8001)
    command.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    command.add_argument("--once", action="store_true", help="end after the first answer")


def _fetch(parsed: argparse.Namespace) -> None:
    from models.datasets import movielens

    print(movielens.fetch(parsed.data))


def _train(parsed: argparse.Namespace) -> None:
    from models.train import train

    train(parsed.data, parsed.artefacts, seed=parsed.seed, people=parsed.people, epochs=parsed.epochs)


def _pack(parsed: argparse.Namespace) -> None:
    from models.pack import pack

    say = partial(print, flush=True)  # progress, also in a pipe
    wanted = {"recall": parsed.recall, "kind": parsed.index, "may_hoist": not parsed.no_hoist}
    wanted["may_quantise"] = parsed.int8
    pack(parsed.config, parsed.out, **wanted, force=parsed.force, say=say)


def _evaluate(parsed: argparse.Namespace) -> None:
    from app.bundle import load
    from models.evaluate import read_requests, report
    from models.loss import check

    generation = load(parsed.bundle)
    report(generation, parsed.requests, parsed.most, parsed.k)
    if parsed.truth:
        from models.truth import report as report_truth

        report_truth(generation, parsed.requests, parsed.truth, parsed.most)
    print("\n".join(check(generation, read_requests(parsed.requests))))


def _synthesize(parsed: argparse.Namespace) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is there: on two threads products differ in the last digit
    from models.synthesize import synthesize

    synthesize(
        parsed.out,
        parsed.items,
        d=parsed.dim,
        seed=parsed.seed,
        name=parsed.name or parsed.out.name,
        force=parsed.force,
        recall=parsed.recall,
        is_trained=not parsed.untrained,
        hidden=parsed.hidden,
        say=partial(print, flush=True),
    )


def _rewidth(parsed: argparse.Namespace) -> None:
    from models.rewidth import rewidth

    rewidth(parsed.bundle, parsed.out, retrieve=parsed.retrieve, rerank=parsed.rerank, force=parsed.force)


def _quantise(parsed: argparse.Namespace) -> None:
    from models.quantised import quantise

    quantise(parsed.bundle, parsed.requests, parsed.out, force=parsed.force)


def _hoist(parsed: argparse.Namespace) -> None:
    from models.hoisted import hoist

    hoist(parsed.bundle, parsed.out, force=parsed.force)


def _demo(parsed: argparse.Namespace) -> int:
    from models.demo import DemoError, Places, demo

    try:
        demo(
            Places(parsed.data, parsed.artefacts, parsed.bundle),
            (parsed.port, parsed.admin_port),
            parsed.workers,
            people=parsed.people,
            epochs=parsed.epochs,
            once=parsed.once,
        )
    except DemoError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
