"""A made-up world, packed: a bundle on which deadlines bite, requests to load it with, and the truth to judge it by.

    made_up.py ─▶ towers ─▶ embeddings ─▶ what they find for some people ─▶ re-ranker ─▶ pre-ranker ─▶ pack
      items, people,           in blocks       exactly, among a million        trained on clicks, or stand-ins
      choices, requests                        items or all                    (`is_trained`: stand_ins.py)

The same command gives the same files (it keeps numpy and torch to one thread: on two, sums differ in the last digit).
Embeddings and features are f32 up to four million items: gathering 8,000 rows of a million × 64 and multiplying takes
0.6 ms, from f16 1.6 ms (np.take, one thread, AVX-512, 2026-11): numpy widens f16 more slowly than memory delivers
the other half. Above that they are f16, and above twenty million features are i8, so that they fit.
"""

import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx

from app.bundle import NO_ROW, open_session, run_model
from app.features import Inputs, ModelInput, Tables, named_features, request_inputs
from app.flow import Candidates, Person
from models import index, stand_ins
from models.made_up import HISTORY, MOMENT, Choices, Floats, K, Rows, Say, World, draw, unit, write_requests
from models.pack import check_recall, check_target, pack
from models.pack_config import PackError
from models.stand_ins import Found, pre_ranker_names, real, stored
from models.truth import LATENT, TOLD, probability

FEWEST_ITEMS = 1_000
ITEMS_A_SAMPLE, FEWEST_SAMPLES = 250, 400  # pack wants 200 or more; 4,000 tell a mean loss to .003
N_REQUESTS = 5_000
MOST_SEARCHED = 1_000_000  # items among which candidates are found to learn from
N_TAUGHT, TRAINED = (400, 64), (2_000, 256)  # people, and candidates of each, that models are fitted on
ITEMS_EACH = 50  # of a small catalogue, for one of these people
N_SHOWN = 4  # times that each of these was shown, and clicked or not
NOISE = 0.35  # of an untrained embedding, over its item's place in the latent space

PACK = """name = "{name}"
version = "{seed}"
samples = "samples.jsonl"
popular = "popular.npy"

[items]
ids = "item_ids.npy"
embeddings = "embedding.npy"
[items.tables]
features = "features.npy"
log_popularity = "log_popularity.npy"
quality = "quality.npy"
category = "category.npy"
price = "price.npy"
year = "year.npy"
[items.vocab]
category = "category.json"

[users]
ids = "user_ids.npy"
history = "user_history.npy"

[user_tower]
file = "user_tower.onnx"
inputs = [
  {{name = "history", source = "history", table = "embedding", length = {history}, mask = "mask"}},
  {{name = "moment", source = "context", field = "moment", shape = [{moment}]}},
]

[re_ranker]
file = "re_ranker.onnx"
inputs = [
  {{name = "user", source = "user_embedding"}},
  {{name = "item", source = "item_embedding"}},
  {{name = "features", source = "item_table", table = "features"}},
]

[pre_ranker]
weights = "pre_ranker.npz"

[funnel]
retrieve = {retrieve}
rerank = {rerank}
k = {k}
timeout_ms = 100
exclude_history = true
"""


def synthesize(
    out: Path,
    n_items: int,
    *,
    d: int,
    seed: int,
    name: str,
    force: bool,
    recall: float,
    is_trained: bool = True,
    hidden: tuple[int, ...] = stand_ins.HIDDEN,
    say: Say = print,
) -> Path:
    """Make the bundle `out` and, beside it, <out>.requests.jsonl and <out>.truth.npz. Returns `out`. Raises PackError.

    recall: what retrieval must find of the exact best. is_trained: else its models are stand-ins, and need no torch.
    hidden: units of the re-ranker's hidden layers.
    """
    if len(hidden) != len(stand_ins.HIDDEN) or min(hidden) < 1:
        raise PackError(f"--hidden: is {hidden}; allowed are {len(stand_ins.HIDDEN)} numbers of units")
    if n_items < FEWEST_ITEMS or d < 2:
        raise PackError(f"--items, --dim: are {n_items:,}, {d}; allowed are {FEWEST_ITEMS:,} and 2, or more")
    check_recall(recall)
    if seed < 0:
        raise PackError(f"--seed: is {seed}; allowed is 0 or more")
    check_target(out, force)
    made_beside = {name: out.with_name(f"{out.name}.{name}") for name in ("truth.npz", "requests.jsonl")}
    for file in made_beside.values():
        if file.exists() and not force:
            raise PackError(f"{file}: is there already; --force replaces it")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        source = tempfile.TemporaryDirectory(prefix=f".{out.name}.source.", dir=out.parent)
    except OSError as e:
        raise PackError(f"--out {out}: {e.strerror}; allowed is a directory that can be written") from e
    with source as folder:
        world = World(n_items, d, seed, Path(folder), hidden)
        choices = draw(world, say)
        n_samples = min(max(FEWEST_SAMPLES, n_items // ITEMS_A_SAMPLE), N_REQUESTS)
        write_requests(world, "samples", n_samples, world.folder / "samples.jsonl", is_history_sent=True)
        retrieve, rerank = world.widths
        text = PACK.format(name=name, seed=seed, history=HISTORY, moment=MOMENT, retrieve=retrieve, rerank=rerank, k=K)
        (world.folder / "pack.toml").write_text(text)
        make_models(world, choices, say, is_trained=is_trained)
        world.truth.save(world.folder / "truth.npz", *map(world.open, ("taste", "latent", "price")))
        write_requests(world, "requests", N_REQUESTS, world.folder / "requests.jsonl", is_history_sent=False)
        pack(world.folder / "pack.toml", out, recall=recall, may_hoist=False, force=force, say=say)
        for name_beside, file in made_beside.items():
            (world.folder / name_beside).replace(file)
        say(f"requests: {N_REQUESTS:,} in {out}.requests.jsonl; the truth is in {out}.truth.npz")
    return out


def make_models(world: World, choices: Choices, say: Say, *, is_trained: bool) -> None:
    """Write embeddings, graphs and linear weights; the later ones fitted on what exact search finds for some people."""
    rng = world.rng("models")
    if is_trained:
        from models import taught  # torch, which stand-ins do without

        tower = taught.fit_towers(world, choices, say)
    else:
        tower = _untrained_towers(world, rng)
    onnx.save(tower, world.folder / "user_tower.onnx")
    n_people, n_each = TRAINED if is_trained else N_TAUGHT
    n_people = min(n_people, max(N_TAUGHT[0], world.n // ITEMS_EACH))
    some = rng.choice(len(choices.item), min(len(choices.item), n_people), replace=False)
    taught_on = Choices(choices.person[some], choices.moment[some], choices.item[some])
    people = _people(world, taught_on)
    users, searched = _embed(world, tower, people), world.open("embedding")[:MOST_SEARCHED]
    say(f"models: {world.widths[0]:,} of {len(searched):,} items for each of {len(users):,} people, exactly")
    exact = index.search_exactly(searched, users, world.widths[0])
    n_each = min(n_each, exact.shape[1] // 2)
    rows = np.stack([np.sort(rng.choice(found, n_each, replace=False)) for found in exact])
    found = _found(world, people, users, rows)
    if is_trained:
        shown = rng.binomial(N_SHOWN, _probabilities(world, taught_on, rows)) / N_SHOWN
        say(f"models: of {N_SHOWN * rows.size:,} shown, {shown.mean():.3f} were clicked")
        re_ranker = taught.fit_re_ranker(world, found, shown.astype(np.float32).ravel(), say)
    else:
        re_ranker = stand_ins.re_ranker(found, rng, world.hidden, world.features_type)
    onnx.save(re_ranker, world.folder / "re_ranker.onnx")
    session = open_session(re_ranker.SerializeToString(), "re_ranker.onnx")
    features = stored(found.features, world.features_type)
    features = features.astype(np.int64 if features.dtype == np.int8 else np.float32)  # as `read_rows` does
    feeds = {"user": found.user, "item": found.item, "features": features}
    scores = np.asarray(run_model(session, feeds), np.float32).reshape(-1)
    weights, bias = stand_ins.pre_ranker(found, scores)
    names, linear = np.array(pre_ranker_names(world.features_type)), weights.astype(np.float32)
    np.savez(world.folder / "pre_ranker.npz", names=names, weights=linear, bias=np.float32(bias))
    low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
    say(f"models: scores {low:.3f}, {middle:.3f}, {high:.3f} at 5, 50 and 95 % of {len(scores):,} candidates")


def _untrained_towers(world: World, rng: np.random.Generator) -> onnx.ModelProto:
    """Embeddings that turn the latent space into d dimensions, with noise; a user tower that means over them."""
    turn = rng.standard_normal((LATENT, world.d), np.float32)
    latent, popularity, popular = world.open("latent"), world.open("log_popularity"), world.open("popular")[:100]
    embedding = world.create("embedding", world.table_type, world.n, world.d)
    for part in world.blocks():
        noise = NOISE * unit(rng.standard_normal((part.stop - part.start, world.d), np.float32))
        length = 1 + 0.03 * np.clip(popularity[part], -3, 3)[:, None]  # the popular are a little longer
        embedding[part] = unit(unit(latent[part].astype(np.float32) @ turn) + noise) * length
    return stand_ins.user_tower(np.asarray(embedding[popular], np.float32).mean(axis=0), rng)


def _people(world: World, choices: Choices) -> list[Person]:
    """Who chose, as the service would resolve them."""
    histories, people = world.open("user_history"), list[Person]()
    for person, moment in zip(choices.person, choices.moment, strict=True):
        history = np.asarray(histories[person], np.int64)
        people.append(Person(history[history != NO_ROW], {"context.moment": moment[None]}))
    return people


def _embed(world: World, tower: onnx.ModelProto, people: Sequence[Person]) -> Floats:
    session = open_session(tower.SerializeToString(), "user_tower.onnx")
    config = tomllib.loads((world.folder / "pack.toml").read_text())
    inputs = [ModelInput.model_validate(i) for i in config["user_tower"]["inputs"]]
    tables = {"embedding": world.open("embedding")}
    return np.concatenate([run_model(session, request_inputs(inputs, tables, person)) for person in people])


def _found(world: World, people: Sequence[Person], users: Floats, rows: Rows) -> Found:
    """What the models read of each person's candidates, rows i64[q, c]."""
    tables: Tables = {name: world.open(name) for name in ("embedding", "features", *stand_ins.TOLD_APART)}
    parts = []
    for person, user, mine in zip(people, users, rows, strict=True):
        item = np.asarray(tables["embedding"][mine], np.float32)
        given = Candidates(mine, item @ user, np.ones(len(mine), np.uint32), user)
        named = named_features(pre_ranker_names(world.features_type), Inputs(tables, person, given, {}))
        parts.append((np.tile(user, (len(mine), 1)), item, real(tables["features"][mine]), named))
    return Found(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _probabilities(world: World, choices: Choices, rows: Rows) -> Floats:
    """f32[q, c]: how likely each person would click each of these, shown at the moment of the choice."""
    taste = world.truth.moved(world.open("taste")[choices.person], choices.moment)
    told = real(world.open("features")[rows, : len(TOLD)])
    latent = np.asarray(world.open("latent")[rows], np.float32)
    return probability(world.truth.logits(taste[:, None], latent, told))[:, 0]
