"""The corrupt offers, judged by the real loader; and how mixed answers are found."""

import numpy as np
import pytest

from app.bundle import load
from app.errors import BundleError
from app.warmup import prove
from loadtest.agreement import Reference
from loadtest.faults.bundles import WAYS, linked_copy, mixtures
from tests.loadtest.test_table import observed


@pytest.mark.parametrize("way", WAYS)
async def test_each_way_to_spoil_a_copy_is_refused_naming_the_file_and_leaves_the_original_sound(bundle, tmp_path, way):
    name, spoil = WAYS[way]
    copy = linked_copy(bundle, tmp_path / "spoiled")
    spoil(copy / name)
    with pytest.raises(BundleError, match=name):
        await prove(load(copy))
    load(bundle)


def test_an_answer_of_one_generation_with_the_scores_of_another_is_found():
    a, b = (Reference((1, 2), np.array(s, np.float32)) for s in ((0.9, 0.8), (0.7, 0.6)))
    seen = observed([0.01] * 5, [200, 200, 200, 200, 503], [10, 10, 5, 5, 0])
    seen.generation = ["a", "a", "b", "c", ""]
    scores = [[0.9, 0.8], [0.7, 0.6], [0.7, 0.1], [0.9, 0.8], []]
    seen.ids, seen.scores = [[1, 2]] * 4 + [[]], [np.array(s, np.float32) for s in scores]
    seen.is_fresh = [np.array([True, False])] * 5
    found = mixtures(seen, {"a": [a], "b": [b]})
    assert [why.split(":")[0] for why in found] == ["request 1", "request 3"]
    seen.cause = ["", "retrieval user_late", "", "", ""]  # another person was ranked for
    assert [why.split(":")[0] for why in mixtures(seen, {"a": [a], "b": [b]})] == ["request 2", "request 3"]
