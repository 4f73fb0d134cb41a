"""Models and tables → a folder that `python -m models pack` reads: arrays, two ONNX graphs, pack.toml.

The graphs read item tables, so what is exported is the towers' and the re-ranker's upper parts; the lower
parts have become tables. A graph is written only together with a proof: onnxruntime, on the arrays as they
were stored, must give what the trained model gives, to 1e-5, for several numbers of candidates.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from models import deep as deep_model
from models import two_tower as tower_model
from models.calibration import Calibration
from models.clean import Catalogue
from models.deep import Deep
from models.linear import PreRanker
from models.split import Queries, Rows
from models.train import RERANK, RETRIEVE, Fitted, Head

TOLERANCE = 1e-5
OPSET = 17
N_SAMPLES = 400  # pack wants 200 or more
TABLES = (
    "history_vector", "deep_history", "deep_item", "static", "succession", "log_popularity",
    "recent_popularity", "decade", "year", "genres",
)  # fmt: skip

PACK = """name = "movielens-100k"
version = "1"
popular = "popular.npy"
samples = "samples.jsonl"

[items]
ids = "item_ids.npy"
embeddings = "embedding.npy"
[items.tables]
title = "title.npy"
{tables}
[items.vocab]
genres = "genres.json"

[users]
ids = "user_ids.npy"
history = "user_history.npy"

[user_tower]
file = "user_tower.onnx"
inputs = [
  {{name = "history", source = "history", table = "history_vector", length = {tower_length}, mask = "history_mask"}},
]

[re_ranker]
file = "re_ranker.onnx"
inputs = [
  {{name = "history", source = "history", table = "deep_history", length = {deep_length}, mask = "history_mask"}},
  {{name = "item", source = "item_table", table = "deep_item"}},
  {{name = "static", source = "item_table", table = "static"}},
]

[pre_ranker]
weights = "pre_ranker.npz"

[funnel]
retrieve = {retrieve}
rerank = {rerank}
k = 10
timeout_ms = 100
exclude_history = true
"""


class ReRanker(nn.Module):
    """The graph: one request's history, its candidates' rows → a probability each [n]."""

    def __init__(self, deep: Deep, calibration: Calibration) -> None:
        super().__init__()
        self.deep, self.calibration = deep, calibration

    def forward(self, history: Tensor, mask: Tensor, item: Tensor, static: Tensor) -> Tensor:
        g = self.deep.long_view(history, mask)
        logits = self.deep(g, history, mask, item[None], static[None])
        return self.calibration(logits[0], mask)


def write_folder(
    out_dir: Path,
    fitted: Fitted,
    head: Head,
    catalogue: Catalogue,
    samples: Queries,
    known: Rows,
    person_ids: NDArray[np.int64],
) -> Path:
    """Everything pack reads. `samples` are the queries to make sample requests of, `known` the events that the
    user table may hold."""
    out_dir.mkdir(parents=True, exist_ok=True)
    tables = fitted.tables | {"title": catalogue.titles, "item_ids": catalogue.ids}
    for name, table in tables.items():
        np.save(out_dir / f"{name}.npy", table)
    vocab = {name: number for number, name in enumerate(catalogue.genre_names)}
    (out_dir / "genres.json").write_text(json.dumps(vocab, indent=1))
    popular = np.argsort(-fitted.tables["log_popularity"], kind="stable")
    np.save(out_dir / "popular.npy", popular.astype(np.int64))
    _write_users(out_dir, samples, known, person_ids)
    _write_samples(out_dir / "samples.jsonl", samples, catalogue)
    write_pre_ranker(out_dir / "pre_ranker.npz", head.linear)
    export_user_tower(out_dir / "user_tower.onnx", fitted)
    export_re_ranker(out_dir / "re_ranker.onnx", fitted, head.calibration)
    text = PACK.format(
        tables="\n".join(f'{name} = "{name}.npy"' for name in TABLES),
        tower_length=tower_model.LENGTH,
        deep_length=deep_model.LENGTH,
        retrieve=RETRIEVE,
        rerank=RERANK,
    )
    (out_dir / "pack.toml").write_text(text)
    return out_dir


def write_pre_ranker(file: Path, linear: PreRanker) -> None:
    """pre_ranker.npz: names, weights, bias."""
    np.savez(file, names=np.array(linear.names), weights=linear.weights, bias=linear.bias)


def export_user_tower(file: Path, fitted: Fitted) -> None:
    """history [1, L, d], history_mask [1, L] → embedding [1, d]; proved for histories of 0, 1, some and L items."""
    tower = fitted.towers.user_tower.eval()
    length, table = tower_model.LENGTH, fitted.tables["history_vector"]
    example = _history(table, length, 3)
    _export(tower, example, file, ["history", "history_mask"], "embedding", dynamic=())
    for count in (0, 1, length // 2, length):
        _prove(tower, file, ["history", "history_mask"], _history(table, length, count))


def export_re_ranker(file: Path, fitted: Fitted, calibration: Calibration) -> None:
    """The calibrated re-ranker with a dynamic first axis of candidates; proved for 1, 7 and 100 of them."""
    model = ReRanker(fitted.deep, calibration).eval()
    names = ["history", "history_mask", "item", "static"]
    example = _re_ranker_inputs(fitted, 3, 5)
    _export(model, example, file, names, "score", dynamic=("item", "static", "score"))
    for count, n in ((0, 7), (5, 1), (deep_model.LENGTH, 100)):
        _prove(model, file, names, _re_ranker_inputs(fitted, count, n))


def open_graph(file: Path) -> ort.InferenceSession:
    """A session with one thread, as in the service."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])


def _export(
    model: nn.Module, example: tuple[Tensor, ...], file: Path, names: list[str], output: str, dynamic: tuple[str, ...]
) -> None:
    with warnings.catch_warnings():
        # The exporter by tracing is deprecated, not removed; the new one needs a package more.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            example,
            str(file),
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=[output],
            dynamic_axes={name: {0: "n"} for name in dynamic},
        )


def _prove(model: nn.Module, file: Path, names: list[str], inputs: tuple[Tensor, ...]) -> None:
    """Raises ValueError when the graph and the trained model differ by more than TOLERANCE."""
    with torch.no_grad():
        expected = model(*inputs).numpy()
    feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    gap = float(np.abs(open_graph(file).run(None, feeds)[0] - expected).max())
    scale = max(1.0, float(np.abs(expected).max()))
    if not gap <= TOLERANCE * scale:
        raise ValueError(f"{file.name}: differs from the trained model by {gap:.1e}, allowed {TOLERANCE:.0e}")


def _history(table: NDArray[Any], length: int, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` rows of a table as a history [1, L, d] and its mask [1, L]."""
    vectors = np.zeros((1, length, table.shape[1]), np.float32)
    vectors[0, :count] = table[:count]
    mask = (np.arange(length) < count).astype(np.float32)[None]
    return torch.from_numpy(vectors), torch.from_numpy(mask)


def _re_ranker_inputs(fitted: Fitted, count: int, n: int) -> tuple[Tensor, ...]:
    """A history of `count` items and the last n items of the catalogue as candidates."""
    history, mask = _history(fitted.tables["deep_history"], deep_model.LENGTH, count)
    item, static = (torch.from_numpy(fitted.tables[name][-n:]) for name in ("deep_item", "static"))
    return history, mask, item, static


def _write_users(out_dir: Path, samples: Queries, known: Rows, person_ids: NDArray[np.int64]) -> None:
    """user_ids i64[U] and user_history i32[U, H], oldest first, padded with -1: only people with known events."""
    line = samples.timeline
    person = line.person[known]
    people, first, counts = np.unique(person, return_index=True, return_counts=True)
    history = np.full((len(people), counts.max()), -1, np.int32)
    for row, (start, count) in enumerate(zip(first, counts, strict=True)):
        history[row, :count] = line.item[known[start : start + count]]
    np.save(out_dir / "user_ids.npy", person_ids[people])
    np.save(out_dir / "user_history.npy", history)


def _write_samples(file: Path, samples: Queries, catalogue: Catalogue) -> None:
    """Sample requests in the wire form, spread evenly over the queries; what they read, and no target."""
    chosen = np.linspace(0, len(samples) - 1, N_SAMPLES).astype(np.int64)
    lines = []
    for q in chosen:
        history = catalogue.ids[samples.history(q)[-deep_model.LENGTH :]].tolist()
        lines.append(json.dumps({"user": {"history": history}, "k": 10}))
    file.write_text("\n".join(lines) + "\n")
