"""What of a re-ranker needs no candidate, or no request, taken out of its graph: the same scores, less work a row.

    graph ─▶ seen ─▶ first layers folded ─▶ what the request alone decides ─▶ once   run once a request
                                         ─▶ what the item alone decides    ─▶ item   run once, at packing: tables
                                         ─▶ what is left                   ─▶ rest   run a row

It works on graphs nobody here has seen. Every tensor gets a level: by which inputs it depends on. A first layer over a
concatenation, W·[u, i, u·i, x], is a sum of parts: with u known, what multiplies u is a bias, and u·i is i under
other weights, so that W·[…] = Wu·u + b + (Wi + Wui·diag(u))·i + Wx·x: bias and weights are made once a request.

Which axes are rows shows by running the graph on two and on three. Shapes that are read while the graph runs are
made anew in each part; a graph whose shapes depend on values stays whole. What can't be cut raises `Whole` with the
reason, what has nothing to cut `NothingToCut`. Whether a cut pays is not decided here, nor is it believed:
hoisting.py compares the scores and times them. It is over 250 lines because every step works on one graph.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, inliner, numpy_helper

from app.bundle import open_session

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Nodes = list[onnx.NodeProto]

SPREADS = ("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Where", "MatMul")  # one row over n, by themselves
# Operators that compute nothing
MOVES = (
    "Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
)  # fmt: skip
# Operators whose output's shape depends on values; and where others read a shape
BY_VALUE = ("Compress", "NonMaxSuppression", "NonZero", "Unique")
READS_SHAPE = {"ConstantOfShape": 0, "Expand": 1, "OneHot": 1, "Range": 0, "Reshape": 1, "Slice": 1, "Tile": 1}
LARGEST = 1_024  # numbers of a row in an item's table: 4 KB an item, sixteen embeddings of 64
COUNT = "winnow.count"  # [1]: how many rows there are


class Whole(Exception):
    """The graph can't be cut; says why."""


class NothingToCut(Whole):
    """There is nothing in it that could be."""


class Level(IntEnum):
    """What a tensor depends on; SHAPE: only on how many rows there are."""

    NOTHING = 0
    SHAPE = 1
    REQUEST = 2
    ITEM = 3
    BOTH = 4


@dataclass(frozen=True, slots=True)
class Reads:
    """The graph's inputs. request: [1, ...]; item: rows of the catalogue's tables; the others come with candidates."""

    request: tuple[str, ...]
    item: tuple[str, ...]
    others: tuple[str, ...]

    def level(self, name: str) -> Level:
        return Level.REQUEST if name in self.request else Level.ITEM if name in self.item else Level.BOTH


@dataclass(frozen=True, slots=True)
class Parts:
    """A graph in parts. once: request → what `rest` reads of it. item: rows → tables. None where nothing was cut."""

    rest: onnx.ModelProto
    once: onnx.ModelProto | None
    item: onnx.ModelProto | None
    tables: tuple[str, ...]


def cut(model: onnx.ModelProto, reads: Reads, feeds: Feeds, *, is_folded: bool, has_tables: bool) -> Parts:
    """The graph in parts.

    Args:
        model: one that keeps the bundle's contract (graph.py).
        feeds: its inputs for three rows or more.
        is_folded: first layers are folded. has_tables: what the item decides becomes tables.
    Raises: Whole.
    """
    work = _Graph(inliner.inline_local_functions(model) if len(model.functions) else model, reads, feeds)
    if is_folded and not work.fold():
        raise NothingToCut("no first layer over a concatenation with a part of the request")
    cuts = {Level.REQUEST: work.settled(Level.REQUEST)}
    if has_tables:
        cuts[Level.ITEM] = work.settled(Level.ITEM)
        if not cuts[Level.ITEM]:
            raise NothingToCut("no operator depends on the item alone")
    elif not cuts[Level.REQUEST]:
        raise NothingToCut("no operator depends on the request alone")
    taken = set().union(*(map(id, nodes) for nodes in cuts.values()))
    left = [node for node in work.nodes if work.at(node) > Level.SHAPE and id(node) not in taken]
    edges = {level: work.edges(nodes, left) for level, nodes in cuts.items()}
    tables = tuple(edges.get(Level.ITEM, ()))
    given = dict.fromkeys(edges[Level.REQUEST], Level.REQUEST) | dict.fromkeys(tables, Level.ITEM)
    return Parts(
        rest=work.model(left, [o.name for o in work.graph.output], given),
        once=work.model(cuts[Level.REQUEST], edges[Level.REQUEST], {}) if edges[Level.REQUEST] else None,
        item=work.model(cuts[Level.ITEM], tables, {}) if tables else None,
        tables=tables,
    )


class _Graph:
    """A graph that is being cut. shapes: of each tensor at two and at three rows; types: of its numbers."""

    def __init__(self, model: onnx.ModelProto, reads: Reads, feeds: Feeds) -> None:
        self.source, self.graph, self.reads = model, model.graph, reads
        self.nodes = list(model.graph.node)
        if any(a.type in (a.GRAPH, a.GRAPHS) for node in self.nodes for a in node.attribute):
            raise Whole("it has inner graphs (If, Loop or Scan)")
        if model.graph.sparse_initializer:
            raise Whole("it has sparse weights")
        self.weights = {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}
        self.weights |= {n.output[0]: _constant(n) for n in self.nodes if n.op_type == "Constant"}
        used = {name for node in self.nodes for name in (*node.input, *node.output)}
        self.names = (name for i in itertools.count() if (name := f"winnow.part.{i}") not in used)
        self.made: dict[str, Array] = {}  # constants of nodes that are put in
        self.shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        self.types: dict[str, np.dtype[Any]] = {}
        self._see(feeds)
        self._levels()

    def _see(self, feeds: Feeds) -> None:
        """Run it whole on two rows and on three, with every tensor as an output."""
        probe = onnx.ModelProto()
        probe.CopyFrom(self.source)
        made = [name for node in self.nodes for name in node.output if name]
        outputs = {o.name for o in probe.graph.output}
        probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in outputs)
        per_row = (*self.reads.item, *self.reads.others)
        session = open_session(probe.SerializeToString(), "re_ranker.onnx")
        names = [o.name for o in session.get_outputs()]
        seen = []
        for n in (2, 3):
            given = {name: array[:n] if name in per_row else array for name, array in feeds.items()}
            seen.append(given | dict(zip(names, session.run(None, given), strict=True)))
        for name, two in seen[0].items():
            if isinstance(two, np.ndarray):
                self.shapes[name], self.types[name] = (two.shape, seen[1][name].shape), two.dtype

    def _levels(self) -> None:
        self.level = dict.fromkeys(self.weights, Level.NOTHING)
        self.level |= {i.name: self.reads.level(i.name) for i in self.graph.input if i.name not in self.weights}
        for node in self.nodes:
            found = {self.level[name] for name in node.input if name} - {Level.NOTHING}
            if node.op_type in ("Shape", "Size"):
                found = {Level.SHAPE} if found else found
            elif found != {Level.SHAPE}:
                found -= {Level.SHAPE}
            at = READS_SHAPE.get(node.op_type, len(node.input))
            if node.op_type in BY_VALUE or any(self.level[n] > Level.SHAPE for n in node.input[at:] if n):
                raise Whole(f"a shape depends on values ({node.op_type})")
            level = Level.BOTH if len(found) > 1 else next(iter(found), Level.NOTHING)
            self.level |= dict.fromkeys((name for name in node.output if name), level)

    def at(self, node: onnx.NodeProto) -> Level:
        return self.level[next(name for name in node.output if name)]

    def has_rows(self, name: str) -> bool:
        """Whether its first axis is the rows, and no other depends on how many there are."""
        two, three = self.shapes.get(name, ((), ()))
        return two[:1] == (2,) and three[:1] == (3,) and two[1:] == three[1:]

    def is_fixed(self, name: str) -> bool:
        two, three = self.shapes.get(name, ((), (0,)))
        return two == three

    # ------------------------------------------------------------------------------------- cutting

    def settled(self, level: Level) -> Nodes:
        """The nodes of this level worth it, whose outputs can cross to others: rows first, or without any."""
        inside = self._worth([node for node in self.nodes if self.at(node) is level])
        while True:
            taken = set(map(id, inside))
            others = [n for n in self.nodes if self.at(n) > Level.SHAPE and id(n) not in taken]
            crossing = set(self.edges(inside, others))
            bad = {name for name in crossing if not self._can_cross(name, level)}
            if not bad:
                return inside
            kept = Nodes()
            for node in inside:  # without those that read what is no longer made here
                if bad & {*node.input, *node.output}:
                    bad |= set(node.output)
                else:
                    kept.append(node)
            inside = kept

    def _worth(self, nodes: Nodes) -> Nodes:
        """Those that compute something, with what they read; numbers that are only moved may be moved again."""
        computed, wanted, worth = set[str](), set[str](), Nodes()
        for node in nodes:
            if node.op_type not in MOVES or computed & set(node.input):
                computed |= set(node.output)
        for node in reversed(nodes):
            if (computed | wanted) & set(node.output):
                wanted |= set(node.input)
                worth.insert(0, node)
        return worth

    def _can_cross(self, name: str, level: Level) -> bool:
        if level is Level.REQUEST:
            return self.has_rows(name) or self.is_fixed(name)
        is_float = self.types.get(name) == np.float32
        return self.has_rows(name) and is_float and int(np.prod(self.shapes[name][0][1:])) <= LARGEST

    def edges(self, inside: Nodes, others: Nodes) -> list[str]:
        """What these nodes make and others read, in order."""
        wanted = {name for node in others for name in node.input} | {o.name for o in self.graph.output}
        return [name for node in inside for name in node.output if name and name in wanted]

    def model(self, inside: Nodes, outputs: Sequence[str], given: Mapping[str, Level]) -> onnx.ModelProto:
        """A model of these nodes, and of what constants and shapes they need.

        given: what comes as an input that another part made; of the request it has one row.
        """
        needed, kept, shapes = set(outputs), Nodes(), set[str]()
        ours = set(map(id, inside))
        for node in reversed(self.nodes):
            if not needed & set(node.output):
                continue
            if id(node) in ours or self.at(node) <= Level.SHAPE:
                is_shape = node.op_type in ("Shape", "Size") and self.at(node) is Level.SHAPE
                shapes |= set(node.output) if is_shape else set()
                needed |= set() if is_shape else set(node.input)
                kept.insert(0, node)
        inputs = [i for i in self.graph.input if i.name in needed and i.name not in self.weights]
        per_row = [i.name for i in inputs if self.reads.level(i.name) is not Level.REQUEST]
        per_row += [name for name, level in given.items() if level is Level.ITEM and name in needed]
        first, wide = self._spread(kept, given) if given else (Nodes(), {})
        nodes, weights = first, {name: self.weights[name] for name in needed if name in self.weights}
        for node in kept:
            if set(node.output) & shapes:
                nodes += self._shape(node, weights, is_one=not per_row)
            elif node.op_type != "Constant":
                nodes.append(_reading(node, {n: wide[n] for n in node.input if n in wide and self._needs(node, n)}))
        if any(COUNT in node.input for node in nodes):
            if not per_row:
                raise Whole("nothing a row is left")
            weights["winnow.zero"] = np.array([0])
            count = [
                helper.make_node("Shape", [per_row[0]], ["winnow.shape_of_rows"]),
                helper.make_node("Gather", ["winnow.shape_of_rows", "winnow.zero"], [COUNT]),
            ]
            nodes = count + nodes
        weights |= {name: self.made[name] for node in nodes for name in node.input if name in self.made}
        values = [*map(_copied, inputs), *(self._value(n, level) for n, level in given.items() if n in needed)]
        is_score = {o.name: o for o in self.graph.output}
        made = [_copied(is_score[name]) if name in is_score else self._value(name, Level.BOTH) for name in outputs]
        initializers = [numpy_helper.from_array(np.asarray(a, order="C"), name) for name, a in weights.items()]
        graph = helper.make_graph(nodes, self.graph.name or "re_ranker", values, made, initializers)
        return helper.make_model(graph, opset_imports=self.source.opset_import, ir_version=self.source.ir_version)

    def _spread(self, kept: Nodes, given: Mapping[str, Level]) -> tuple[Nodes, dict[str, str]]:
        """Where one row of the request has to be as many as there are candidates: nodes, and the wide one's name."""
        nodes, wide = Nodes(), dict[str, str]()
        for name, level in given.items():
            if level is Level.REQUEST and any(self._needs(node, name) for node in kept):
                to, ones = next(self.names), next(self.names)
                wide[name] = next(self.names)
                self.made[ones] = np.array(self.shapes[name][0][1:], np.int64)
                nodes.append(helper.make_node("Concat", [COUNT, ones], [to], axis=0))
                nodes.append(helper.make_node("Expand", [name, to], [wide[name]]))
        return nodes, wide

    def _needs(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether this operator wants one row of `name` for each candidate, and doesn't spread it by itself."""
        if name not in node.input or not self.has_rows(name):
            return False
        if node.op_type == "Gemm":
            return name in node.input[:2]
        rank = len(self.shapes[name][0])
        others = [o for o in node.input if o and self.level[o] > Level.REQUEST and self.has_rows(o)]
        spreads = node.op_type in SPREADS and (node.op_type != "MatMul" or rank > 2)
        return not (spreads and any(len(self.shapes[o][0]) == rank for o in others))

    def _shape(self, node: onnx.NodeProto, weights: dict[str, Array], *, is_one: bool) -> Nodes:
        """The shape of a tensor, without the tensor. is_one: where there is one row only."""
        (two, three), output = self.shapes.get(node.input[0], ((), (0,))), node.output[0]
        # Sizes of axes: [of one row, times how many there are], or [fixed, 0].
        sizes = [(a, 0) if a == b else (a // 2, 1) for a, b in zip(two, three, strict=False)]
        is_known = len(two) == len(three) and all(
            (each * 2, each * 3) == (a, b) for a, b, (each, times) in zip(two, three, sizes, strict=True) if times
        )
        if node.op_type == "Size" or not is_known:
            raise Whole(f"it reads the {node.op_type.lower()} of {node.input[0]}")
        span = {a.name: a.i for a in node.attribute}
        sizes = sizes[span.get("start") : span.get("end", len(sizes))]
        if is_one or not any(times for _, times in sizes):
            weights[output] = np.array([each for each, _ in sizes], np.int64)
            return []
        nodes, parts = Nodes(), list[str]()
        for each, times in sizes:
            weights[size := next(self.names)] = np.array([each], np.int64)
            parts.append(next(self.names) if times else size)
            if times:
                nodes.append(helper.make_node("Mul", [COUNT, size], [parts[-1]]))
        return [*nodes, helper.make_node("Concat", parts, [output], axis=0)]

    def _value(self, name: str, level: Level) -> onnx.ValueInfoProto:
        two, _ = self.shapes[name]
        first: list[int | str] = list(two)
        if self.has_rows(name):
            first[0] = 1 if level is Level.REQUEST else "n"
        kind = helper.np_dtype_to_tensor_dtype(self.types[name])
        return helper.make_tensor_value_info(name, kind, first)

    # ------------------------------------------------------------------------------------- folding

    def fold(self) -> bool:
        """Split the layers over a concatenation with parts of the request, in place. Returns whether there were any."""
        folded = [node for node in list(self.nodes) if node.op_type in ("MatMul", "Gemm") and self._fold(node)]
        if folded:
            self._levels()
            wanted, live = {o.name for o in self.graph.output}, Nodes()
            for node in reversed(self.nodes):  # without those that only the layers read which are gone
                if wanted & set(node.output):
                    wanted |= set(node.input)
                    live.insert(0, node)
            self.nodes = live
        return bool(folded)

    def _fold(self, node: onnx.NodeProto) -> bool:
        layer, makes = self._layer(node), {name: n for n in self.nodes for name in n.output}
        concat = makes.get(node.input[0])
        if layer is None or concat is None or concat.op_type != "Concat":
            return False
        (weight, bias), axis = layer, next(a.i for a in concat.attribute if a.name == "axis")
        shapes = [self.shapes.get(name, ((),))[0] for name in concat.input]
        if axis not in (1, -1) or any(len(shape) != 2 for shape in shapes):
            return False
        ours = dict[str, Array]()  # what is left of the concatenation → its weights
        products, alone = list[tuple[str, str, Array]](), list[tuple[str, Array]]()
        ends = np.cumsum([shape[1] for shape in shapes])
        for name, rows in zip(concat.input, np.split(weight, ends[:-1]), strict=True):
            if self.level[name] is Level.REQUEST and self._is_row(name, len(rows)):
                alone.append((name, rows))
            elif pair := self._product(makes.get(name), len(rows)):
                products.append((*pair, rows))
                ours.setdefault(pair[1], np.zeros_like(rows))
            else:
                ours[name] = ours.get(name, 0) + rows
        if not ours or not (products or alone):  # all of it is the request's: it is cut as it is
            return False
        self._put_in(node, ours, products, alone, bias)
        return True

    def _layer(self, node: onnx.NodeProto) -> tuple[Array, Array | None] | None:
        """Weights [in, out] and bias of a dense layer whose weights are known; None for another."""
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        is_plain = not given.get("transA") and given.get("alpha", 1) == given.get("beta", 1) == 1
        weight, bias = (self.weights.get(name) for name in (*node.input[1:3], "")[:2])
        if not is_plain or weight is None or weight.ndim != 2 or weight.dtype != np.float32:
            return None
        if len(node.input) > 2 and bias is None:
            return None
        return weight.T if given.get("transB") else weight, bias

    def _is_row(self, name: str, width: int) -> bool:
        two = self.shapes[name][0]
        return two[1:] == (width,) and (self.has_rows(name) or (self.is_fixed(name) and two[0] == 1))

    def _product(self, node: onnx.NodeProto | None, width: int) -> tuple[str, str] | None:
        """What of the request multiplies what else, element by element."""
        if node is None or node.op_type != "Mul":
            return None
        for ours, other in itertools.permutations(node.input):
            is_other = self.level[other] > Level.REQUEST and self.has_rows(other)
            if self.level[ours] is Level.REQUEST and self._is_row(ours, width) and is_other:
                return (ours, other) if self.shapes[other][0][1:] == (width,) else None
        return None

    def _put_in(
        self,
        node: onnx.NodeProto,
        ours: Mapping[str, Array],
        products: Sequence[tuple[str, str, Array]],
        alone: Sequence[tuple[str, Array]],
        bias: Array | None,
    ) -> None:
        """In the layer's place: its weights and bias for this request, and a layer over what is left."""
        n_out, before = next(iter(ours.values())).shape[1], Nodes()

        def add(kind: str, reads: Sequence[str], shape: tuple[int, ...], **given: Any) -> str:
            name = next(self.names)
            before.append(helper.make_node(kind, reads, [name], **given))
            self.shapes[name], self.types[name] = (shape, shape), np.dtype(np.float32)
            return name

        matrices = []
        for name, weight in ours.items():
            matrix, shape = self._constant(weight), weight.shape
            for row, other, rows in products:
                if other == name:
                    column = add("Transpose", [row], (len(rows), 1), perm=[1, 0])
                    scaled = add("Mul", [column, self._constant(rows)], shape)
                    matrix = add("Add", [matrix, scaled], shape)
            matrices.append(matrix)
        height = sum(map(len, ours.values()))
        whole = matrices[0] if len(ours) == 1 else add("Concat", matrices, (height, n_out), axis=0)
        sums = [add("MatMul", [row, self._constant(rows)], (1, n_out)) for row, rows in alone]
        sums += [] if bias is None else [self._constant(np.broadcast_to(bias, (1, n_out)))]
        for one in sums[1:]:
            sums[0] = add("Add", [sums[0], one], (1, n_out))
        left = next(iter(ours))
        if len(ours) > 1:
            left = add("Concat", list(ours), (), axis=1)
            self.shapes[left] = (2, height), (3, height)
        kind = "Gemm" if sums else "MatMul"
        before.append(helper.make_node(kind, [left, whole, *sums[:1]], list(node.output)))
        at = next(i for i, one in enumerate(self.nodes) if one is node)
        self.nodes[at : at + 1] = before

    def _constant(self, array: Array) -> str:
        name = next(self.names)
        self.weights[name] = np.ascontiguousarray(array, np.float32)
        return name


def _constant(node: onnx.NodeProto) -> Array:
    """The value of a Constant. Raises Whole for one that isn't a number, a list of them or a tensor."""
    ((name, value),) = ((a.name, helper.get_attribute_value(a)) for a in node.attribute)
    if name == "value":
        return numpy_helper.to_array(value)
    if name not in ("value_float", "value_floats", "value_int", "value_ints"):
        raise Whole(f"it has a constant by {name}")
    return np.array(value, np.float32 if "float" in name else np.int64)


def _reading(node: onnx.NodeProto, others: Mapping[str, str]) -> onnx.NodeProto:
    """The node, reading these others instead."""
    if not others:
        return node
    changed = onnx.NodeProto()
    changed.CopyFrom(node)
    changed.input[:] = [others.get(name, name) for name in node.input]
    return changed


def _copied(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copy = onnx.ValueInfoProto()
    copy.CopyFrom(value)
    return copy
