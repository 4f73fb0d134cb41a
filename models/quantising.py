"""The re-ranker in eight bits, where that is faster on this machine and costs next to nothing of the answers.

    graph ─▶ its products in int8: all but the last, or but the first as well ─▶ rows alone? ─▶ faster?
          ─▶ loses less than MOST_LOST of the funnel's NDCG@k? ─▶ the fastest that does, or the graph as it was

Quantisation is static (onnxruntime's QDQ, weights by channel): the ranges of what flows are fixed once, on sample
requests. Where they were found on the batch itself, a row's score would depend on its neighbours'. For NDCG an item is
worth what the float model says, above the least of the request's candidates: there is no better judge at packing.
The first product is tried in float as well, since it reads inputs of all scales, which share one range.

Eight bits are fast where the processor multiplies them (VNNI): elsewhere the clock says no.
"""

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization

from app.bundle import Generation
from app.flow import Candidates, Query, best_first
from models import evaluate, graph, hoisting
from models.graph_parts import Parts
from models.metrics import ndcg_loss
from models.pack_config import PackError

Array = NDArray[Any]
Floats = NDArray[np.float32]
Say = Callable[[str], None]

MOST_LOST = 0.002  # of the funnel's NDCG@k
RANGED, JUDGED, TRIALS = 100, 400, 5  # sample requests on which ranges are found, answers compared, seconds taken
PRODUCTS = ("Gemm", "MatMul")
OFFSET = 1e-9  # no division by zero where all candidates are worth the same


@dataclass(frozen=True, slots=True)
class _Sample:
    """What re-ranking gets for one request: candidates, the inputs of its graph; the float model's scores f32[n]."""

    candidates: Candidates
    feeds: dict[str, Array]
    scores: Floats


class _Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
    """Sample requests, one after the other."""

    def __init__(self, samples: Sequence[_Sample]) -> None:
        self.left = iter([sample.feeds for sample in samples])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.left, None)


def quantise_where_it_pays(
    generation: Generation, model: onnx.ModelProto, queries: Sequence[Query], say: Say
) -> tuple[Generation, onnx.ModelProto]:
    """The generation with its re-ranker in eight bits, and that graph; or both as they were.

    generation: whole, with its index. model: its re-ranker's graph. queries: sample requests, 200 or more.
    """
    ways, samples = dict(_ways(model)), list(_samples(generation, queries))
    some = [sample for sample in samples if len(sample.scores) >= max(hoisting.FEW)]
    some = some[:: max(1, len(some) // TRIALS)][:TRIALS]
    if not ways or not some:
        why = "no sample request has candidates to try it on" if ways else "it has no product to be in int8"
        say(f"re-ranker: served in float32; {why}")
        return generation, model
    plain = hoisting.Way(Parts(model, None, None, ()), "in float32")
    fit = [plain, *_proved(generation, model, ways, samples, some, say)]
    took = hoisting.timed(fit, [hoisting.Trial(one.candidates.rows, one.feeds) for one in some], generation)
    k = generation.manifest.funnel.k
    lost = {way.what: _lost(way, samples, k) for way in fit}
    said = "; ".join(f"{took[way.what] * 1e3:.2f} ms {way.what}, NDCG@{k} -{lost[way.what]:.2%}" for way in fit)
    least = min(hoisting.PAYS * took[plain.what], took[plain.what] - hoisting.PAYS_S)
    allowed = [way for way in fit if lost[way.what] <= MOST_LOST and took[way.what] <= least]
    best = min(allowed, key=lambda way: took[way.what], default=plain)
    say(f"re-ranker: served {best.what}; {len(some[0].scores)} rows take {said}, allowed are {MOST_LOST:.1%}")
    return replace(generation, re_ranker=best.rest.session), best.parts.rest


def _ways(model: onnx.ModelProto) -> Iterator[tuple[str, list[str]]]:
    """Which products are to be in eight bits, by what the way is called. Gives every node a name of its own.

    A product is a Gemm or MatMul with an initializer on its right. The last stay in float: their outputs are scores,
    which would have 256 values and tie.
    """
    for number, node in enumerate(model.graph.node):
        node.name = f"{node.op_type}_{number}"
    constants = {i.name for i in model.graph.initializer}
    products = [n for n in model.graph.node if n.op_type in PRODUCTS and n.input[1] in constants]
    depth: dict[str, int] = {}  # of products before a value
    for node in model.graph.node:  # in order: a graph is sorted
        before = max((depth.get(name, 0) for name in node.input), default=0)
        depth |= dict.fromkeys(node.output, before + (node in products))
    last = max(depth.values(), default=0)
    inner = {n.name: depth[n.output[0]] for n in products if depth[n.output[0]] < last}
    if inner:
        yield "in int8", list(inner)
    if later := [name for name, at in inner.items() if at > 1]:
        yield "in int8 but for the first layer", later


def _samples(generation: Generation, queries: Sequence[Query]) -> Iterator[_Sample]:
    """What reaches re-ranking."""
    chosen = [queries[at] for at in np.unique(np.linspace(0, len(queries) - 1, JUDGED).astype(int))]
    for query, kept in evaluate.kept(generation, chosen):
        if len(kept):
            feeds = evaluate.re_ranker_feeds(generation, query, kept)
            reads = {i.name for i in generation.re_ranker.get_inputs()}
            yield _Sample(
                kept,
                {name: array for name, array in feeds.items() if name in reads},
                evaluate.re_rank(generation, query, kept),
            )


def _proved(
    generation: Generation,
    model: onnx.ModelProto,
    ways: dict[str, list[str]],
    samples: Sequence[_Sample],
    some: Sequence[_Sample],
    say: Say,
) -> Iterator[hoisting.Way]:
    """Those that can be made and score rows alone in each of some samples; why one can't is said."""
    per_item = [i.name for i in generation.manifest.features.re_ranker if i.per == "item"]
    ranged = samples[:: max(1, len(samples) // RANGED)]
    for what, nodes in ways.items():
        try:
            way = hoisting.Way(Parts(_quantised(model, nodes, ranged), None, None, ()), what)
            for one in some:
                graph.check_rows_alone(way, one.feeds, per_item, hoisting.RE_RANKER)
        except PackError as e:
            say(f"re-ranker: not {what}: {e}")
        except Exception as e:  # neither onnx's nor onnxruntime's exceptions have a root
            why = (str(e).strip() or type(e).__name__).splitlines()[0]
            say(f"re-ranker: not {what}: it can't be made ({why:.300})")
        else:
            yield way


def _quantised(model: onnx.ModelProto, nodes: list[str], samples: Sequence[_Sample]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)  # what is handed over is changed
    was = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends a step that would do nothing here
    try:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "int8.onnx"
            quantization.quantize_static(
                copy,
                out,
                _Reader(samples),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(PRODUCTS),
                nodes_to_quantize=nodes,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            return onnx.load(str(out))
    finally:
        logging.disable(was)


def _lost(way: hoisting.Way, samples: Sequence[_Sample], k: int) -> float:
    """Of NDCG@k, mean over the requests."""
    lost = []
    for sample in samples:
        rows, is_finite = sample.candidates.rows, np.isfinite(sample.scores)
        least = sample.scores.min(where=is_finite, initial=np.inf)
        worth = np.where(is_finite, sample.scores.astype(np.float64) - least, 0.0) + OFFSET
        orders = (best_first(scores, rows, k)[:k] for scores in (np.asarray(way(sample.feeds)), sample.scores))
        shown, ideal = (worth[order] for order in orders)
        lost.append(float(ndcg_loss(shown, ideal)))
    return float(np.mean(lost))
