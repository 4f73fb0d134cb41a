"""Bundles: what is read from a sound one; and every unsound one is refused in one sentence that names the file."""

import errno
import json
import os
import socket
from pathlib import Path
from unittest.mock import Mock

import faiss
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx.external_data_helper import set_external_data

from app.__main__ import main
from app.bundle import NO_ROW, Ids, load
from app.errors import BundleError, ContractError
from app.manifest import MANIFEST_BYTES, Knots
from app.warmup import offline_query, prove
from tests import world
from tests.seal import reseal

FILES = [
    "index.faiss",
    "items/embedding.npy",
    "items/genres.npy",
    "items/id_order.npy",
    "items/ids.npy",
    "items/title.npy",
    "items/year.npy",
    "manifest.json",
    "popular.npy",
    "pre_ranker.npz",
    "re_ranker.onnx",
    "user_tower.onnx",
    "users/age.npy",
    "users/history.npy",
    "users/id_order.npy",
    "users/ids.npy",
    "users/occupation.npy",
    "vocab/genres.json",
    "vocab/user.occupation.json",
]


def refusal(bundle: Path, digest: str | None = None) -> str:
    """Why it is refused: one sentence, one line."""
    with pytest.raises(BundleError) as caught:
        load(bundle, digest)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------------- sound


def test_the_list_of_files_is_whole(bundle):
    assert sorted(p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()) == FILES


def test_a_sound_bundle_holds_what_was_put_in(generation):
    assert (generation.n_items, generation.d) == (world.N, world.D)
    assert generation.popular.tolist() == world.POPULAR.tolist()
    assert generation.vocab["genres"] == world.GENRES
    assert generation.users.ids.external(np.arange(5)) == list(world.USER_IDS)
    assert generation.pre_ranker.names == world.PRE_RANKER[0]
    assert generation.name == f"tiny@1#{generation.digest[:12]}"


def test_display_only_tables_and_embeddings_can_not_be_filtered_by(generation):
    assert generation.filterable == ("genres", "year")


async def test_a_sound_bundle_proves_itself(generation):
    await prove(generation)


def test_the_manifests_digest_can_be_asked_for(bundle, generation):
    assert load(bundle, generation.digest).digest == generation.digest
    assert refusal(bundle, "0" * 64).startswith("manifest.json: its SHA-256 is")


def test_check_says_that_it_is_sound(bundle, capsys):
    assert main(["check", str(bundle)]) == 0
    assert ": sound" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------- tampered


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_refused(copy, name):
    (copy / name).unlink()
    assert name in refusal(copy)


@pytest.mark.parametrize("name", [f for f in FILES if f != "manifest.json"])
def test_a_file_changed_by_one_byte_is_refused(copy, name):
    raw = bytearray((copy / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (copy / name).write_bytes(raw)
    assert refusal(copy).startswith(f"{name}: its SHA-256")


def test_a_manifest_changed_by_one_byte_is_refused_by_who_knows_its_digest(copy, generation):
    text = (copy / "manifest.json").read_text()
    (copy / "manifest.json").write_text(text.replace('"tiny"', '"tinz"', 1))
    assert refusal(copy, generation.digest).startswith("manifest.json: its SHA-256")


@pytest.mark.parametrize("name", ["index.faiss", "items/year.npy", "re_ranker.onnx"])
def test_a_file_cut_short_is_refused(copy, name):
    raw = (copy / name).read_bytes()
    (copy / name).write_bytes(raw[:-1])
    assert refusal(copy).startswith(f"{name}: has {len(raw) - 1} bytes")


@pytest.mark.parametrize("name", ["notes.txt", "items/more.npy", "users/.hidden", "new/file"])
def test_a_file_nobody_listed_is_refused(copy, name):
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / name).write_bytes(b"")
    assert refusal(copy) == f"{name}: not listed in the manifest"


def test_a_linked_file_is_refused(copy, tmp_path):
    (copy / "popular.npy").rename(tmp_path / "popular.npy")
    (copy / "popular.npy").symlink_to(tmp_path / "popular.npy")
    assert refusal(copy) == "popular.npy: is a link; a bundle has none"


def test_a_linked_folder_is_refused(copy, tmp_path):
    (copy / "users").rename(tmp_path / "users")
    (copy / "users").symlink_to(tmp_path / "users")
    assert refusal(copy) == "users: is a link; a bundle has none"


def test_a_linked_manifest_is_refused(copy, tmp_path):
    (copy / "manifest.json").rename(tmp_path / "manifest.json")
    (copy / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert refusal(copy).startswith("manifest.json: missing")


def fifo(file: Path) -> None:
    os.mkfifo(file)


def listener(file: Path) -> None:
    with socket.socket(socket.AF_UNIX) as s:
        folder = os.open(file.parent, os.O_RDONLY)  # a socket's path has at most 107 bytes, pytest's are longer
        s.bind(f"/proc/self/fd/{folder}/{file.name}")
        os.close(folder)


@pytest.mark.parametrize("make", [fifo, listener])
@pytest.mark.parametrize("name", ["popular.npy", "items/year.npy", "items/more.npy"])
def test_what_is_no_plain_file_is_refused_unopened(copy, name, make):
    (copy / name).unlink(missing_ok=True)
    make(copy / name)
    assert refusal(copy) == f"{name}: is neither a file nor a directory"


def test_a_manifest_that_is_no_plain_file_is_refused_unopened(copy):
    (copy / "manifest.json").unlink()
    fifo(copy / "manifest.json")
    assert refusal(copy).startswith("manifest.json: missing")


def test_a_manifest_too_large_to_be_one_is_refused_unread(copy):
    os.truncate(copy / "manifest.json", MANIFEST_BYTES + 1)
    assert refusal(copy) == f"manifest.json: has {MANIFEST_BYTES + 1} bytes; allowed are {MANIFEST_BYTES}"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("pathlib.Path.is_dir", "manifest.json"),
        ("pathlib.Path.read_bytes", "manifest.json"),
        ("pathlib.Path.iterdir", "."),
        ("hashlib.file_digest", "index.faiss"),
    ],
)
@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), OSError(errno.EIO, "I/O error")])
def test_what_the_system_can_not_read_is_refused_by_name(copy, monkeypatch, call, name, error):
    monkeypatch.setattr(call, Mock(side_effect=error))
    with pytest.raises(BundleError) as caught:
        load(copy)
    monkeypatch.undo()
    assert str(caught.value) == f"{name}: can't be read ({error.strerror})"


@pytest.mark.parametrize("name", ["re_ranker.onnx", "user_tower.onnx", "index.faiss", "popular.npy"])
def test_a_file_that_vanishes_once_it_was_verified_is_refused_by_name(copy, monkeypatch, name):
    monkeypatch.setattr("app.bundle.verify_files", lambda path, _: (path / name).unlink())
    assert refusal(copy).startswith(f"{name}: ")


def test_a_switched_link_leaves_a_loaded_bundle_where_it_is(copy, tmp_path):
    (tmp_path / "current").symlink_to(copy)
    assert load(tmp_path / "current").path == copy.resolve()


def change_manifest(bundle: Path, change) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", ["../outside.npy", "items/../../outside.npy", "/etc/hostname", "items\\year.npy"])
def test_a_path_that_leaves_the_directory_is_refused(copy, name):
    (copy.parent / "outside.npy").write_bytes(b"")
    change_manifest(copy, lambda m: m["files"].update({name: {"sha256": "0" * 64, "size": 0}}))
    message = refusal(copy)
    assert message.startswith("manifest.json: the file name")
    assert "leaves the bundle's directory" in message


@pytest.mark.parametrize("part", ["tower", "index"])
def test_a_retriever_that_names_a_file_elsewhere_is_refused(copy, tmp_path, part):
    file = {"tower": "user_tower.onnx", "index": "index.faiss"}[part]
    (tmp_path / file).write_bytes((copy / file).read_bytes())
    change_manifest(copy, lambda m: m["retrievers"][0].update({part: f"../{file}"}))
    assert file in refusal(copy)


def test_no_directory_is_refused(tmp_path):
    assert "no such directory" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff", b'"x"', b"NaN"])
def test_a_manifest_that_is_no_json_object_is_refused(copy, text):
    (copy / "manifest.json").write_bytes(text)
    assert refusal(copy).startswith("manifest.json: ")


@pytest.mark.parametrize(
    ("where", "change"),
    [
        ("format_version", lambda m: m.update(format_version=2)),
        ("surprise", lambda m: m.update(surprise=1)),
        ("retrievers", lambda m: m.update(retrievers=[])),
        ("funnel.k", lambda m: m["funnel"].update(k=0)),
        ("calibration.retrieval", lambda m: m["calibration"]["retrieval"].update(x=[0, 0, 1])),
        ("calibration.preranking.y.0", lambda m: m["calibration"]["preranking"]["y"].__setitem__(0, -np.inf)),
        ("calibration.typical", lambda m: m["calibration"].update(typical_retrieval_score=np.nan)),
        ("features.re_ranker.0", lambda m: m["features"]["re_ranker"][0].update(source="nowhere")),
        ("features.re_ranker.4.shape.0", lambda m: m["features"]["re_ranker"][4].update(shape=[0])),
        ("features.re_ranker.4.default", lambda m: m["features"]["re_ranker"][4].update(default=np.inf)),
        ("features.re_ranker.4.shape.0", lambda m: m["features"]["re_ranker"][4].update(shape=[10**13])),
        (
            "features.re_ranker.4: Value error, `shape`",
            lambda m: m["features"]["re_ranker"][4].update(shape=[4_096, 2]),
        ),
        ("retrievers.0.overfetch", lambda m: m["retrievers"][0].update(overfetch=1e308)),
        ("retrievers.0.search.efSearch", lambda m: m["retrievers"][0].update(kind="hnsw", search={"efSearch": 2**40})),
        ("retrievers.0.search.nprobe", lambda m: m["retrievers"][0].update(kind="ivf_pq", search={"nprobe": 2**70})),
        ("retrievers.0.search.nprobe", lambda m: m["retrievers"][0].update(kind="ivf_pq", search={"nprobe": 0})),
        ("retrievers.0.sampled", lambda m: m["retrievers"][0].update(sampled=-1)),
        (
            "retrievers.0: Value error, kind flat has the parameters none; `sampled` is for ivf_sq",
            lambda m: m["retrievers"][0].update(sampled=16),
        ),
        ("files", lambda m: m.update(files={"items/ids.npy": {"sha256": "x", "size": 1}})),
        ("name", lambda m: m.pop("name")),
    ],
)
def test_a_manifest_that_is_not_the_schema_is_refused_by_field(copy, where, change):
    change_manifest(copy, change)
    assert refusal(copy).startswith(f"manifest.json: {where}")


# --------------------------------------------------------------------- every hash right, the shape wrong


def save(name: str, array):
    def spoil(bundle: Path) -> None:
        with (bundle / name).open("wb") as file:
            np.save(file, array)

    return spoil


def flat(rows: int, d: int, kind=faiss.IndexFlatIP):
    def spoil(bundle: Path) -> None:
        index = kind(d)
        index.add(np.ones((rows, d), np.float32))
        faiss.write_index(index, str(bundle / "index.faiss"))

    return spoil


def archive(name: str):
    def spoil(bundle: Path) -> None:
        with (bundle / name).open("wb") as file:
            np.savez(file, rows=ROWS)

    return spoil


def weights(**arrays):
    names, values = world.PRE_RANKER
    whole = {"names": np.array(names), "weights": np.array(values, np.float32), "bias": np.float32(0)}

    def spoil(bundle: Path) -> None:
        np.savez(bundle / "pre_ranker.npz", **{k: v for k, v in (whole | arrays).items() if v is not None})

    return spoil


def text(name: str, content: bytes):
    def spoil(bundle: Path) -> None:
        (bundle / name).write_bytes(content)

    return spoil


def wider_input(name: str):
    def spoil(bundle: Path) -> None:
        graph = onnx.load(bundle / "re_ranker.onnx")
        value = next(i for i in graph.graph.input if i.name == name)
        value.type.tensor_type.shape.dim[-1].dim_value = world.D + 1
        onnx.save(graph, bundle / "re_ranker.onnx")

    return spoil


def longer_history(bundle: Path) -> None:
    graph = onnx.load(bundle / "re_ranker.onnx")
    value = next(i for i in graph.graph.input if i.name == "history")
    value.type.tensor_type.shape.dim[1].dim_value = world.READ + 1
    onnx.save(graph, bundle / "re_ranker.onnx")


def longer_mask(bundle: Path) -> None:
    graph = onnx.load(bundle / "user_tower.onnx")
    shapes = {i.name: i.type.tensor_type.shape for i in graph.graph.input}
    shapes["history"].dim[1].dim_param = "h"  # open, so that only the mask's own size is wrong
    shapes["mask"].dim[1].dim_value = world.READ + 1
    onnx.save(graph, bundle / "user_tower.onnx")


def one_more_input(bundle: Path) -> None:
    graph = onnx.load(bundle / "re_ranker.onnx")
    graph.graph.input.append(onnx.helper.make_tensor_value_info("surprise", onnx.TensorProto.FLOAT, [1, 1]))
    onnx.save(graph, bundle / "re_ranker.onnx")


ROWS = np.arange(world.N)


@pytest.mark.parametrize(
    ("named", "spoil"),
    [
        ("items/year.npy", save("items/year.npy", np.zeros(world.N - 1, np.float32))),
        ("items/year.npy", save("items/year.npy", np.zeros(world.N, np.complex64))),
        ("items/year.npy", save("items/year.npy", np.float32(1))),
        ("items/embedding.npy", save("items/embedding.npy", np.zeros(world.N, np.float32))),
        ("items/embedding.npy", save("items/embedding.npy", np.zeros((world.N, world.D), np.int32))),
        ("index.faiss", save("items/embedding.npy", np.zeros((world.N, world.D + 1), np.float32))),
        ("items/ids.npy", save("items/ids.npy", np.zeros(world.N, np.int64))),
        ("items/ids.npy", save("items/ids.npy", np.arange(world.N, dtype=np.float64))),
        ("items/ids.npy", save("items/ids.npy", np.arange(world.N).reshape(1, -1))),
        ("items/ids.npy", save("items/ids.npy", np.empty(0, np.int64))),
        ("items/id_order.npy", save("items/id_order.npy", ROWS[:-1])),
        ("items/id_order.npy", save("items/id_order.npy", ROWS + 1)),
        ("items/ids.npy", save("items/id_order.npy", ROWS)),
        ("popular.npy", save("popular.npy", np.array([0, world.N]))),
        ("popular.npy", save("popular.npy", np.array([-1]))),
        ("popular.npy", save("popular.npy", np.array([1, 1]))),
        ("popular.npy", save("popular.npy", np.array([[0, 1]]))),
        ("popular.npy", save("popular.npy", np.array(["a"]))),
        ("popular.npy", save("popular.npy", np.array([0.5, 1.5]))),
        ("users/age.npy", save("users/age.npy", np.zeros(4, np.float32))),
        ("users/age.npy", save("users/age.npy", np.zeros((5, 2), np.float32))),
        ("users/history.npy", save("users/history.npy", np.full((5, 2), world.N, np.int32))),
        ("users/history.npy", save("users/history.npy", np.zeros((4, 2), np.int32))),
        ("users/history.npy", save("users/history.npy", np.zeros((5, 2), np.float32))),
        ("users/history.npy", save("users/history.npy", np.zeros(5, np.int32))),
        ("index.faiss", flat(world.N - 1, world.D)),
        ("index.faiss", flat(world.N, world.D + 1)),
        ("index.faiss", flat(world.N, world.D, faiss.IndexFlatL2)),
        ("index.faiss", text("index.faiss", b"not an index")),
        ("popular.npy", text("popular.npy", b"not an array")),
        ("popular.npy: not an array", archive("popular.npy")),
        ("ids.npy: not an array", archive("items/ids.npy")),
        ("title.npy: not an array", archive("items/title.npy")),
        ("pre_ranker.npz", text("pre_ranker.npz", b"not an archive")),
        ("pre_ranker.npz", save("pre_ranker.npz", np.zeros(3))),
        ("pre_ranker.npz", weights(bias=None)),
        ("pre_ranker.npz", weights(weights=np.zeros(2, np.float32))),
        ("pre_ranker.npz", weights(weights=np.array([1, np.nan, 1], np.float32))),
        ("pre_ranker.npz", weights(bias=np.float32(np.inf))),
        ("pre_ranker.npz", weights(bias=np.zeros(2, np.float32))),
        ("pre_ranker.npz", weights(names=np.array(["retrieval_score", "history_log_count", "item.year"]))),
        ("vocab/genres.json", text("vocab/genres.json", b'{"drama": "zero"}')),
        ("vocab/genres.json", text("vocab/genres.json", b'{"drama": 1%s}' % (b"0" * 400))),
        ("vocab/user.occupation.json", text("vocab/user.occupation.json", b'{"artist": %d}' % -(2**53 + 1))),
        ("re_ranker.onnx", text("re_ranker.onnx", b"not a graph")),
        ("user_tower.onnx", text("user_tower.onnx", b"")),
        ("re_ranker.onnx: input surprise is not bound", one_more_input),
        ("re_ranker.onnx: input history is tensor(float) [1, 6", longer_history),
        ("user_tower.onnx: input mask is tensor(float) [1, 6", longer_mask),
        ("re_ranker.onnx: not a graph", wider_input("item")),
    ],
)
def test_what_does_not_fit_is_refused_though_its_hash_is_right(copy, named, spoil):
    spoil(copy)
    reseal(copy)
    assert refusal(copy).startswith(named)


@pytest.mark.parametrize("is_node", [False, True])
@pytest.mark.parametrize("location", ["planted.bin", "below/planted.bin"])
def test_weights_outside_the_graph_are_refused_though_they_lie_where_the_service_runs(
    copy, tmp_path, monkeypatch, location, is_node
):
    planted = tmp_path / "cwd" / location
    planted.parent.mkdir(parents=True)
    planted.write_bytes(np.float32(0.1).tobytes())
    monkeypatch.chdir(tmp_path / "cwd")
    graph = onnx.load(copy / "re_ranker.onnx")
    tenth = next(i for i in graph.graph.initializer if i.name == "tenth")
    set_external_data(tenth, location, offset=0, length=4)
    tenth.ClearField("raw_data")
    if is_node:
        graph.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["tenth"], value=tenth))
        graph.graph.initializer.remove(tenth)
    (copy / "re_ranker.onnx").write_bytes(graph.SerializeToString())
    reseal(copy)
    assert refusal(copy).startswith("re_ranker.onnx: not a graph that onnxruntime opens")


def inverted_file(bundle: Path, lists: Path | None = None) -> None:
    """Make the index an IVF of two lists, in its own file or mapped from another."""
    quantizer = faiss.IndexFlatIP(world.D)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, world.D, 2, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.train(world.EMBEDDING)
    index.add(world.EMBEDDING)
    if lists:
        on_disk = faiss.OnDiskInvertedLists(2, index.code_size, str(lists))
        on_disk.merge_from(index.invlists, 0)
        index.replace_invlists(on_disk)
    faiss.write_index(index, str(bundle / "index.faiss"))
    reseal(bundle, lambda m: m["retrievers"][0].update(kind="ivf_sq8", search={"nprobe": 2}))


async def test_an_order_that_is_not_reproduced_is_told_by_item_and_place(copy):
    def swapped(manifest) -> None:
        golden = manifest["golden"][0]
        golden["items"][:2] = golden["items"][1::-1]

    reseal(copy, swapped)
    with pytest.raises(
        BundleError, match=r"golden request 0 gives item \S+ the score .*, and its place .*; the manifest"
    ):
        await prove(load(copy))


def test_a_number_of_items_that_is_not_the_tables_is_told_beside_the_manifests(copy):
    reseal(copy, lambda manifest: manifest["retrievers"][0].update(n=2))
    assert refusal(copy) == "index.faiss: holds 50 × 8, items are 50 × 8, the manifest says 2 items"


async def test_inverted_lists_in_the_file_itself_are_served(copy):
    inverted_file(copy)
    await prove(load(copy))


def test_inverted_lists_that_the_index_maps_from_outside_are_refused_unopened(copy, tmp_path):
    inverted_file(copy, tmp_path / "outside.ivf")
    assert refusal(copy).startswith("index.faiss: not an index that FAISS opens")
    assert "outside.ivf" not in Path("/proc/self/maps").read_text()


def test_inverted_lists_that_the_index_maps_are_refused_though_they_lie_beside_it(copy):
    inverted_file(copy, copy / "lists.ivf")
    assert refusal(copy).startswith("index.faiss: not an index that FAISS opens")


@pytest.mark.parametrize("number", [-(2**53), 2**53])
def test_the_largest_category_numbers_can_be_asked_for(copy, number):
    (copy / "vocab/user.occupation.json").write_text(json.dumps({"artist": number}))
    reseal(copy)
    query = offline_query({"user": {"features": {"occupation": "artist"}}}, load(copy))
    assert query.person.fields["user.occupation"].tolist() == [[number]]


def test_pickles_are_refused(copy):
    np.save(copy / "popular.npy", np.array([{}], object), allow_pickle=True)
    reseal(copy)
    assert refusal(copy).startswith("popular.npy: not an array that numpy opens without pickle")


ZEBRA = {"name": "zebra", "source": "retrieval_score"}


def rebind(**changes):
    def change(manifest) -> None:
        for i in manifest["features"]["re_ranker"]:
            i.update(changes.get(i["name"], {}))

    return change


@pytest.mark.parametrize(
    ("named", "change"),
    [
        ("re_ranker.onnx: input bid is not bound", lambda m: m["features"]["re_ranker"].pop(4)),
        ("re_ranker.onnx: input zebra is unknown", lambda m: m["features"]["re_ranker"].append(ZEBRA)),
        ("re_ranker.onnx: input year", rebind(year={"table": "genres"})),
        ("re_ranker.onnx: input year reads the item table nowhere", rebind(year={"table": "nowhere"})),
        ("re_ranker.onnx: input year reads the item table title", rebind(year={"table": "title"})),
        ("re_ranker.onnx: input history", rebind(history={"length": 6})),
        ("re_ranker.onnx: input occupation", rebind(occupation={"dtype": "float32"})),
        ("re_ranker.onnx: input freshness", rebind(freshness={"shape": [2]})),
        ("users/age.npy", rebind(age={"shape": [2]})),
        ("pre_ranker.npz", lambda m: m["features"].update(pre_ranker=["retrieval_score"])),
        ("index.faiss", lambda m: m["retrievers"][0].update(n=49)),
        ("tower.onnx", lambda m: m["retrievers"][0].update(tower="tower.onnx")),
    ],
)
def test_a_schema_that_does_not_fit_the_files_is_refused(copy, named, change):
    reseal(copy, change)
    assert refusal(copy).startswith(named)


@pytest.mark.parametrize(
    "feature",
    [
        "item.nowhere",
        "item.title",
        "item.genres",
        "item.genres.2",
        "item.genres.x",
        "item.year.0",
        "item",
        "history_max.year",
        "history_last.nowhere",
        "history_mean.genres.0",
        "history_overlap.embedding",
        "history_gap.genres",
        "history_min.embedding",
        "user",
        "nonsense",
    ],
)
def test_a_feature_that_can_not_be_made_is_refused_by_name(copy, feature):
    names = np.array([feature, *world.PRE_RANKER[0][1:]])
    weights(names=names)(copy)
    reseal(copy, lambda m: m["features"].update(pre_ranker=names.tolist()))
    message = refusal(copy)
    assert message.startswith("pre_ranker.npz: ")
    assert feature in message


def test_a_field_that_is_no_single_number_is_no_feature(copy):
    reseal(copy, rebind(bid={"shape": [2]}))
    assert refusal(copy).startswith("pre_ranker.npz: candidate.bid")


@pytest.mark.parametrize(
    "feature",
    ["item.year", "item.genres.1", "history_max.embedding", "history_overlap.genres", "history_gap.year", "user.age"],
)
def test_a_feature_that_can_be_made_is_accepted(copy, feature):
    names = np.array([feature, *world.PRE_RANKER[0][1:]])
    weights(names=names)(copy)
    reseal(copy, lambda m: m["features"].update(pre_ranker=names.tolist()))
    assert load(copy).pre_ranker.names[0] == feature


def test_bindings_of_the_same_input_twice_are_refused(copy):
    def twice(manifest) -> None:
        inputs = manifest["features"]["re_ranker"]
        inputs.append(dict(inputs[0]))

    reseal(copy, twice)
    assert refusal(copy).startswith("re_ranker.onnx: input user")


# ------------------------------------------------------------------------------------------ golden


async def unproven(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        await prove(load(bundle))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda golden: golden.update(scores=[golden["scores"][0] + 0.01, *golden["scores"][1:]]),
        lambda golden: golden["items"].__setitem__(0, world.item_id(49)),
        lambda golden: golden["items"].pop(),
        lambda golden: golden["scores"].pop(),
        lambda golden: golden["request"].update(filters=[{"field": "colour", "eq": 1}]),
        lambda golden: golden["request"].update(k="many"),
        lambda golden: golden["request"].update(user={"id": 2**70}),
    ],
)
async def test_a_golden_request_that_does_not_reproduce_is_refused(copy, change):
    reseal(copy, lambda m: change(m["golden"][0]))
    assert (await unproven(copy)).startswith("manifest.json: golden request 0")


@pytest.mark.parametrize(
    "change",
    [lambda m: m.pop("golden"), lambda m: m.update(golden=[]), lambda m: [g.update(items=[]) for g in m["golden"]]],
)
async def test_a_bundle_with_nothing_to_prove_is_refused(copy, change):
    reseal(copy, change)
    assert (await unproven(copy)).startswith("manifest.json: golden must hold a request")


async def test_a_model_that_fails_on_a_golden_request_is_refused(copy):
    graph = onnx.load(copy / "re_ranker.onnx")
    graph.graph.initializer.remove(next(i for i in graph.graph.initializer if i.name == "tenth"))
    graph.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "tenth"))
    onnx.save(graph, copy / "re_ranker.onnx")
    reseal(copy)
    assert "reranking (failed)" in await unproven(copy)


@pytest.mark.parametrize("fault", [OverflowError, AttributeError, IndexError, MemoryError, TypeError, ValueError])
@pytest.mark.parametrize("call", ["app.bundle.check_shapes", "app.warmup.rank_offline"])
def test_what_no_check_foresaw_is_refused_in_one_sentence(bundle, monkeypatch, capsys, call, fault):
    monkeypatch.setattr(call, Mock(side_effect=fault))
    assert main(["check", str(bundle)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("refused: manifest.json: ")
    assert line.endswith(f"({fault.__name__})")


@pytest.mark.parametrize("call", ["app.bundle.check_shapes", "app.warmup.rank_offline"])
def test_a_broken_contract_is_not_blamed_on_the_bundle(bundle, monkeypatch, call):
    monkeypatch.setattr(call, Mock(side_effect=ContractError("a stage lost candidates")))
    with pytest.raises(ContractError):
        main(["check", str(bundle)])


def test_check_exits_with_2_and_one_sentence(copy, capsys):
    (copy / "popular.npy").unlink()
    assert main(["check", str(copy)]) == 2
    assert capsys.readouterr().err == "refused: popular.npy: listed in the manifest but missing\n"


def test_check_runs_the_golden_requests(copy, capsys):
    reseal(copy, lambda m: m["golden"][0].update(scores=[9.0] * world.K))
    assert main(["check", str(copy)]) == 2
    assert "golden request 0" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- ids


def ids_of(values) -> Ids:
    array = np.array(values)
    return Ids(array, np.argsort(array))


def test_integers_are_found_whatever_their_order():
    assert ids_of([30, 10, 20]).rows([10, 20, 30, 10]).tolist() == [1, 2, 0, 1]


def test_strings_are_found_whatever_their_order():
    assert ids_of(["b", "", "abc"]).rows(["abc", "b", ""]).tolist() == [2, 0, 1]


@pytest.mark.parametrize("unknown", [11, -1, 2**63, 2**200, -(2**200), "10", "", "x" * 300])
def test_what_is_not_among_integers_is_no_row(unknown):
    assert ids_of([30, 10, 20]).rows([unknown, 10]).tolist() == [NO_ROW, 1]
    assert ids_of([30, 10, 20]).rows([unknown]).tolist() == [NO_ROW]


@pytest.mark.parametrize("unknown", ["ab", "abcd", "x" * 300, 7, 2**200, "abc\0", "\0", "é"])
def test_what_is_not_among_strings_is_no_row(unknown):
    assert ids_of(["b", "abc"]).rows([unknown, "abc"]).tolist() == [NO_ROW, 1]
    assert ids_of(["b", "abc"]).rows([unknown]).tolist() == [NO_ROW]


def test_a_small_integer_type_does_not_wrap():
    assert Ids(np.array([1, 2], np.int8), np.array([0, 1])).rows([257, 2]).tolist() == [NO_ROW, 1]


def test_nothing_wanted_gives_nothing():
    assert ids_of([1]).rows([]).tolist() == []


@given(st.lists(st.text(max_size=5).filter(lambda s: "\0" not in s), min_size=1, unique=True), st.data())
def test_each_string_is_found_in_its_row(values, data):
    ids = ids_of(values)
    assert ids.rows(values).tolist() == list(range(len(values)))
    other = data.draw(st.sampled_from(values) | st.text(max_size=7))
    assert ids.rows([other]).tolist() == [values.index(other) if other in values else NO_ROW]


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, unique=True), st.integers())
def test_each_integer_is_found_in_its_row(values, other):
    ids = Ids(np.array(values, np.int64), np.argsort(np.array(values, np.int64)))
    assert ids.rows(values).tolist() == list(range(len(values)))
    assert ids.rows([other]).tolist() == [values.index(other) if other in values else NO_ROW]


# ------------------------------------------------------------------------------------- calibration

KNOTS = Knots(x=(0, 1, 3), y=(10, 20, 60))  # slopes 10 and 20


@pytest.mark.parametrize(
    ("x", "y"), [(0, 10), (0.5, 15), (1, 20), (2, 40), (3, 60), (-1, 10 - 10), (5, 60 + 2 * 20), (np.nan, np.nan)]
)
def test_knots_are_linear_between_and_go_on_beyond_their_ends(x, y):
    np.testing.assert_allclose(KNOTS(np.array([x], np.float32)), [y])


def test_knots_of_nothing_are_nothing():
    assert KNOTS(np.empty(0, np.float32)).shape == (0,)


@given(st.lists(st.floats(-100, 100, width=32), min_size=2))
def test_knots_keep_the_order(scores):
    out = KNOTS(np.array(sorted(scores), np.float32))
    assert np.all(np.diff(out) >= 0)
    assert out.dtype == np.float32


@pytest.mark.parametrize(
    ("x", "y"), [((0, 1), (1, 0)), ((0, 0), (0, 1)), ((0, 1), (0, 1, 2)), ((0,), (0,)), ((1, 0), (0, 1))]
)
def test_knots_that_do_not_rise_are_refused(x, y):
    with pytest.raises(ValueError, match=r"calibration knots|at least 2"):
        Knots(x=x, y=y)
