"""pack.toml → a bundle: what any team does with its arrays and ONNX files, and what the trainers here do too.

    arrays ─▶ checked, copied ┐
    graphs ─▶ checked, bound ─┴▶ draft ─▶ index ─▶ cut, int8 ─▶ calibration ─▶ loss ─▶ golden ─▶ proved ─▶ in place

The draft is a directory beside the target: there is a whole bundle or none. The end is what the service itself
does at its start (load, then the golden requests), so what was packed can be served. Every refusal is a
PackError of one sentence. Same inputs, same files, but for `created` (SOURCE_DATE_EPOCH fixes that too) and for where
the re-ranker is cut, and whether int8 pays, which the clock decides (`may_hoist=False` leaves it whole). It is over
250 lines because every arrow above is a step here, in that order.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import faiss
import numpy as np
import onnx
from numpy.typing import NDArray

from app.bundle import ITEMS, USERS, VOCAB, Generation, Ids, PreRanker, Users, check_shapes, load, mapped, open_session
from app.control.loss import at_share
from app.errors import BundleError
from app.features import FeatureSchema
from app.flow import Candidates, Origin, Query, sealed
from app.manifest import MANIFEST, Calibration, FileEntry, Golden, Knots, Manifest, Recall, Retriever, sha256
from models import evaluate, graph, hoisting, index, loss, score_scale
from models.pack_config import PackConfig, PackError, read_config
from models.pack_files import AT_ONCE, read_json, write_items, write_pre_ranker, write_users, write_vocabularies
from models.quantising import quantise_where_it_pays

Say = Callable[[str], None]

FEWEST_SAMPLES = 200  # sample requests; fewer make a calibration of noise
MOST_CALIBRATION_ROWS = 400_000  # candidates re-ranked for the calibration: 2 s at 5 µs a row
N_GOLDEN = 8
TRIAL_REQUESTS, TRIAL_ROWS = 5, 48  # of the check that rows are scored alone
FEWEST_TIMED = max(hoisting.FEW)  # rows of a trial on which a re-ranker in parts is compared with the whole
SEED = 20
IDENTITY = Knots(x=(0.0, 1.0), y=(0.0, 1.0))


def pack(
    config_file: Path,
    out: Path,
    *,
    recall: float = 0.95,
    kind: index.Kind | None = None,
    may_hoist: bool = True,
    may_quantise: bool = False,
    force: bool = False,
    say: Say = print,
) -> Path:
    """Make the bundle `out` from a configuration. Returns `out`.

    Args:
        recall: what retrieval must find of the exact best, at the configured width.
        kind: the index kind to begin with, instead of the one that the catalogue's size suggests.
        may_hoist: cut the re-ranker where that pays (hoisting.py); else it is served as it is.
        may_quantise: serve it in eight bits where that pays and loses next to nothing (quantising.py).
        force: replace a bundle that is there.
    Raises: PackError. Nothing is left behind then, and what was there stays.
    """
    check_recall(recall)
    config = read_config(config_file)
    check_target(out, force)
    with draft_beside(out) as draft:
        try:
            generation = _fill(config, draft, (recall, kind), (may_hoist, may_quantise), say)
        except BundleError as e:
            raise PackError(str(e)) from e
        move(draft, out)
    _summarise(generation, out, config, say)
    return out


def _fill(
    config: PackConfig, draft: Path, wanted: tuple[float, index.Kind | None], may: tuple[bool, bool], say: Say
) -> Generation:
    """Everything that the bundle holds, step by step. Returns it as the service would load it."""
    may_hoist, may_quantise = may
    say(f"pack: {config.name} {config.version}")
    requests = check_samples(config.samples)
    n_items = write_items(config, draft)
    write_users(config, draft, n_items)
    write_vocabularies(config, draft)
    names = write_pre_ranker(config, draft)
    say(f"arrays: {n_items:,} items, {len(config.items.tables)} tables")
    models = _bind(config, say)
    generation = _open_draft(draft, _draft_manifest(config, names, n_items), models)
    queries = evaluate.resolve(generation, requests)
    users = evaluate.embed(generation, queries)
    generation = _try_models(generation, models, queries, users)
    say(f"graphs: rows are scored alone, on {TRIAL_REQUESTS} requests of {TRIAL_ROWS} rows")
    generation = _with_index(generation, users, wanted, say)
    tried = trials(generation, queries) if may_hoist else []
    if may_hoist and not tried:
        say(f"re-ranker: served whole; no sample request has {FEWEST_TIMED} candidates to time it on")
    if tried:
        generation, parts = hoisting.cut_where_it_pays(generation, models[hoisting.RE_RANKER], tried, say)
        models |= parts
    if may_quantise:
        re_ranker = models[hoisting.RE_RANKER]
        generation, models[hoisting.RE_RANKER] = quantise_where_it_pays(generation, re_ranker, queries, say)
    for name, model in models.items():
        (draft / name).write_bytes(model.SerializeToString(deterministic=True))
    return measured(generation, queries, requests, say)


def check_samples(file: Path) -> list[evaluate.Request]:
    """The sample requests. Raises PackError where they are too few."""
    requests = evaluate.read_requests(file)
    if len(requests) < FEWEST_SAMPLES:
        raise PackError(
            f"samples: {file.name} has {len(requests)} requests; allowed is {FEWEST_SAMPLES} or more, the "
            "calibration is fitted on them"
        )
    return requests


def measured(
    generation: Generation, queries: Sequence[Query], requests: Sequence[evaluate.Request], say: Say
) -> Generation:
    """What hangs on the re-ranker's scores: calibration, losses and golden requests, written. Returns it as loaded."""
    generation = _with_calibration(generation, queries, say)
    generation = _with_loss(generation, requests, say)
    write_manifest(generation.manifest, generation.path)
    return with_golden(load(generation.path), requests, say)


# --------------------------------------------------------------------------------------------- graphs


def _bind(config: PackConfig, say: Say) -> dict[str, onnx.ModelProto]:
    """Both graphs, by their name in the bundle, with the inputs of the schema."""
    tower = graph.read_graph(config.user_tower.file)
    graph.bind_user_tower(tower, config.user_tower.inputs, config.user_tower.file.name)
    re_ranker = graph.read_graph(config.re_ranker.file)
    expanded = graph.bind_re_ranker(re_ranker, config.re_ranker.inputs, config.re_ranker.file.name)
    if expanded:
        say(f"graphs: sent once and expanded to the rows: {', '.join(expanded)}")
    return {"user_tower.onnx": tower, "re_ranker.onnx": re_ranker}


def _try_models(
    generation: Generation, models: Mapping[str, onnx.ModelProto], queries: Sequence[Query], users: NDArray[np.float32]
) -> Generation:
    """Prove on rows of the catalogue that the re-ranker keeps its contract.

    Returns: the generation with the re-ranker as it will be stored: one score a row, [n].
    """
    file, rng = "re_ranker.onnx", np.random.default_rng(SEED)
    per_item = [i.name for i in generation.manifest.features.re_ranker if i.per == "item"]
    for at in np.linspace(0, len(queries) - 1, TRIAL_REQUESTS).astype(int):
        candidates = _trial_candidates(generation, queries[at], users[at], rng)
        if len(candidates) < 2:
            continue
        feeds = evaluate.re_ranker_feeds(generation, queries[at], candidates)
        output = _run(generation, file, feeds)
        if graph.check_output(output, len(candidates), file):
            graph.flatten_output(models[file])
            session = open_session(models[file].SerializeToString(deterministic=True), file)
            generation = replace(generation, re_ranker=session)
        graph.check_rows_alone(partial(_run, generation, file), feeds, per_item, file)
    return generation


def trials(generation: Generation, queries: Sequence[Query]) -> list[hoisting.Trial]:
    """Some sample requests as they reach re-ranking, to be timed on."""
    chosen = [queries[at] for at in np.linspace(0, len(queries) - 1, TRIAL_REQUESTS).astype(int)]
    return [
        hoisting.Trial(candidates.rows, evaluate.re_ranker_feeds(generation, query, candidates))
        for query, candidates in evaluate.kept(generation, chosen)
        if len(candidates) >= FEWEST_TIMED
    ]


def _trial_candidates(
    generation: Generation, query: Query, user: NDArray[np.float32], rng: np.random.Generator
) -> Candidates:
    """The caller's own candidates if it names some, else rows from all over the catalogue."""
    rows = np.arange(generation.n_items) if query.candidates is None else query.candidates
    rows = np.sort(rng.choice(rows, min(TRIAL_ROWS, len(rows)), replace=False))
    scores = np.asarray(generation.tables["embedding"][rows], np.float32) @ user
    return Candidates(rows, sealed(scores), np.full(len(rows), Origin.INDEX, np.uint32), user)


def _run(generation: Generation, file: str, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    try:
        return generation.re_ranker.run(None, dict(feeds))[0]  # type: ignore[no-any-return]
    except Exception as e:  # onnxruntime's exceptions have no root of their own
        n = max(len(v) for v in feeds.values())
        raise PackError(f"{file}: doesn't run on {n} rows ({str(e).strip().splitlines()[0]:.300})") from e


# ------------------------------------------------------------------------------- index, calibration, golden


def _with_index(
    generation: Generation, users: NDArray[np.float32], wanted: tuple[float, index.Kind | None], say: Say
) -> Generation:
    target, kind = wanted
    embeddings = np.load(generation.path / ITEMS / "embedding.npy", mmap_mode="r")  # its own map: read from end to end
    width = generation.manifest.funnel.retrieve
    built = index.build(embeddings, users, width, target, kind=kind, say=say)
    with (generation.path / "index.faiss").open("wb", buffering=AT_ONCE) as file:
        faiss.write_index(built.index, faiss.PyCallbackIOWriter(file.write, AT_ONCE))
    search = ", ".join(f"{name} {value}" for name, value in built.search.items()) or "exact"
    search += f", a sample of 1 in {built.sampled}" if built.sampled else ""
    say(
        f"index: {built.kind} ({search}), recall@{built.recall.at} {built.recall.reached:.3f} on "
        f"{built.recall.n_queries} queries, asked {target:g}; {built.search_s * 1e3:.2f} ms a search"
    )
    retriever = generation.manifest.retrievers[0].model_copy(
        update={name: getattr(built, name) for name in ("kind", "search", "overfetch", "sampled", "recall")}
    )
    manifest = generation.manifest.model_copy(update={"retrievers": (retriever,)})
    return replace(generation, manifest=manifest, index=built.index)


def _with_calibration(generation: Generation, queries: Sequence[Query], say: Say) -> Generation:
    """Fit both maps on what retrieval finds for the sample requests."""
    n = int(np.clip(MOST_CALIBRATION_ROWS // generation.manifest.funnel.retrieve, FEWEST_SAMPLES, len(queries)))
    chosen = [queries[at] for at in np.linspace(0, len(queries) - 1, n).astype(int)]
    scored = list(evaluate.score_through(generation, chosen))
    found, coarse, fine = (
        np.concatenate(columns).astype(np.float64)
        for columns in zip(*((s.candidates.retrieval_scores, s.preranking, s.reranking) for s in scored), strict=True)
    )
    if not np.isfinite(fine).any():
        raise PackError("samples: retrieval finds no candidate with a finite score for any sample request")
    calibration = Calibration(
        retrieval=score_scale.fit(found, fine),
        preranking=score_scale.fit(coarse, fine),
        typical_retrieval_score=float(np.median(found)),
        n_requests=n,
    )
    say(f"calibration: from {n} requests, {len(fine):,} candidates")
    for name, knots in (("retrieval", calibration.retrieval), ("pre-rank", calibration.preranking)):
        if len(knots.x) == 2:
            say(f"calibration: {name} scores hardly rise with the re-ranker's: what isn't re-ranked is placed blindly")
    return replace(generation, manifest=generation.manifest.model_copy(update={"calibration": calibration}))


def _with_loss(generation: Generation, requests: Sequence[evaluate.Request], say: Say) -> Generation:
    """Measure what degraded answers lose, on carried scores as they will be."""
    say(f"loss: scoring all that {loss.n_samples(generation, requests):,} requests find, then simulating each loss")
    table = loss.measure(generation, requests)
    nothing, everything = ([share] * (len(table.edges) - 1) for share in (0.0, 1.0))
    lost = {
        "re-ranking": at_share(table.preranking, 1.0, everything),
        "pre-ranking": at_share(table.preranking, 0.0, nothing),
        "retrieval": at_share(table.popular, 1.0, nothing),
    }
    said = ", ".join(f"{value:.3f} without {stage}" for stage, value in lost.items())
    say(f"loss: of NDCG@{table.k} {said}, from {table.n_requests} requests")
    return replace(generation, manifest=generation.manifest.model_copy(update={"loss": table}))


def with_golden(generation: Generation, requests: Sequence[evaluate.Request], say: Say) -> Generation:
    """Add some sample requests with what the funnel gives for them, and prove the result as a start would."""
    chosen = [requests[at] for at in np.linspace(0, len(requests) - 1, N_GOLDEN).astype(int)]
    rankings = evaluate.run_funnel(generation, evaluate.resolve(generation, chosen))
    golden = []
    for request, ranking in zip(chosen, rankings, strict=True):
        if ranking.degradations:
            lost = ranking.degradations[0]
            raise PackError(f"golden request {request}: {lost.stage.label} {lost.reason}")
        if not np.isfinite(ranking.scores).all():
            raise PackError(f"golden request {request}: a score is not finite")
        items = tuple(generation.ids.external(ranking.rows))
        golden.append(Golden(request=request, items=items, scores=tuple(ranking.scores.tolist())))
    write_manifest(generation.manifest.model_copy(update={"golden": tuple(golden)}), generation.path)
    proved = load(generation.path)
    evaluate.prove_golden(proved)
    say(f"golden: {len(golden)} requests reproduced")
    return proved


# ------------------------------------------------------------------------------------ draft and manifest


@dataclass(frozen=True, slots=True)
class NoIndex:
    """Stands where the index will be, so that shapes can be checked before hours of building."""

    ntotal: int
    d: int
    metric_type: int = faiss.METRIC_INNER_PRODUCT


def _draft_manifest(config: PackConfig, names: tuple[str, ...], n_items: int) -> Manifest:
    """The manifest with what is measured later still blank."""
    metrics = read_json(config.offline_metrics, "offline_metrics") if config.offline_metrics else {}
    if not isinstance(metrics, dict):
        raise PackError("offline_metrics: must be an object")
    return Manifest(
        format_version=1,
        name=config.name,
        version=config.version,
        created=_created().strftime("%Y-%m-%dT%H:%M:%SZ"),
        files={},
        retrievers=(
            Retriever(name="two_tower", kind="flat", n=n_items, recall=Recall(target=1, reached=0, at=1, n_queries=0)),
        ),
        funnel=config.funnel.config,
        features=FeatureSchema(
            user_tower=config.user_tower.inputs, re_ranker=config.re_ranker.inputs, pre_ranker=names
        ),
        calibration=Calibration(retrieval=IDENTITY, preranking=IDENTITY, typical_retrieval_score=0.0, n_requests=1),
        offline_metrics=metrics,
    )


def _created() -> datetime:
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    if epoch and not epoch.isdecimal():
        raise PackError(f"SOURCE_DATE_EPOCH: is {epoch!r}; allowed are seconds since 1970")
    return datetime.fromtimestamp(int(epoch), UTC) if epoch else datetime.now(UTC)


def _open_draft(draft: Path, manifest: Manifest, models: Mapping[str, onnx.ModelProto]) -> Generation:
    """The draft as a generation without an index. Raises BundleError where shapes don't fit."""
    folders = {part: _arrays(draft / part) for part in (ITEMS, USERS)}
    ids = {part: Ids(a.pop("ids"), a.pop("id_order")) for part, a in folders.items() if a}
    items, people = folders[ITEMS], folders[USERS]
    history = people.pop("history", None)
    sessions = {name: open_session(m.SerializeToString(deterministic=True), name) for name, m in models.items()}
    with np.load(draft / "pre_ranker.npz") as weights:
        linear = PreRanker(manifest.features.pre_ranker, sealed(weights["weights"]), np.float32(weights["bias"]))
    generation = Generation(
        path=draft,
        digest="draft",
        manifest=manifest,
        ids=ids[ITEMS],
        tables=items,
        vocab={f.stem: read_json(f, f.stem) for f in (draft / VOCAB).glob("*.json")},
        users=Users(ids[USERS], people, history) if USERS in ids else None,
        popular=np.load(draft / "popular.npy"),
        index=cast(faiss.Index, NoIndex(len(ids[ITEMS]), items["embedding"].shape[1])),
        user_tower=sessions["user_tower.onnx"],
        re_ranker=sessions["re_ranker.onnx"],
        pre_ranker=linear,
    )
    check_shapes(generation)
    return generation


def _arrays(folder: Path) -> dict[str, NDArray[Any]]:
    return {f.stem: mapped(f) for f in sorted(folder.glob("*.npy"))}


def write_manifest(manifest: Manifest, draft: Path) -> None:
    """manifest.json with the size and SHA-256 of every file that is there."""
    found = sorted(p for p in draft.rglob("*") if p.is_file() and p.name != MANIFEST)
    files = {p.relative_to(draft).as_posix(): FileEntry(sha256=sha256(p), size=p.stat().st_size) for p in found}
    text = manifest.model_copy(update={"files": files}).model_dump_json(indent=1)
    (draft / MANIFEST).write_text(text + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------- target


def check_recall(wanted: float) -> None:
    """Raises PackError for what no index can be asked for."""
    if not 0 < wanted <= 1:
        raise PackError(f"--recall: is {wanted:g}; allowed is more than 0 and at most 1")


def check_target(out: Path, force: bool) -> None:
    """Raises PackError when a bundle may not be made here: something is there already, and isn't to be replaced."""
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise PackError(f"{out}: is there already; --force replaces it")
    if out.is_symlink() or not (out / MANIFEST).is_file():
        raise PackError(f"{out}: is no bundle; --force replaces bundles only")


@contextmanager
def draft_beside(out: Path) -> Iterator[Path]:
    """A directory on the target's file system, removed at the end if it is still there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as e:
        raise PackError(f"{out}: can't be written beside ({e.strerror})") from e
    try:
        draft.chmod(0o755)
        yield draft
    except OSError as e:
        raise PackError(f"{out}: can't be written ({e})") from e
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def move(draft: Path, out: Path) -> None:
    """Into place; a bundle that was there goes aside first, so that there is never half of either."""
    if not out.exists():
        draft.rename(out)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
    out.rename(aside / out.name)
    draft.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _summarise(generation: Generation, out: Path, config: PackConfig, say: Say) -> None:
    manifest = generation.manifest
    retriever, recall = manifest.retrievers[0], manifest.retrievers[0].recall
    size = sum(f.size for f in manifest.files.values())
    say(f"packed {out}")
    say(f"  items        {generation.n_items:,} x {generation.d}")
    say(f"  index        {retriever.kind}, recall@{recall.at} {recall.reached:.3f} (asked {recall.target:g})")
    say(f"  calibration  {manifest.calibration.n_requests} requests")
    say(f"  golden       {len(manifest.golden)} requests")
    say(f"  size         {size / 1e6:,.3g} MB in {len(manifest.files)} files")
    say(f"  digest       {generation.digest}")
    if config.funnel.timeout_ms:
        say(f"  serve with   WINNOW_SLA_MS={config.funnel.timeout_ms:g} (an SLA is the service's, not the bundle's)")
