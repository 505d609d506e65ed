"""Codes: no pair is lost by them, and few others are found."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.curate import coded_cells, margin
from unlabeled.curate import codes as module
from unlabeled.curate._near import near_rows
from unlabeled.curate.blocks import Resources, Rows
from unlabeled.curate.codes import NOTHING, coded, codes_of


def pairs_of(codes, queries, targets, threshold):
    found = [np.stack(part, 1) for part in codes.near(queries, targets, threshold)]
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def vectors_of(count, width, seed):
    """Of length 1, near to each other in groups; one of zeros, and one in a single direction."""
    generator = np.random.default_rng(seed)
    vectors = (
        generator.normal(size=(count, width)) + 2 * generator.normal(size=(5, width))[np.arange(count) % 5]
    )
    vectors[0], vectors[1] = 0, np.arange(width) == 0
    return Rows(vectors.astype(np.float32))


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 1000),
    st.sampled_from([1, 2, 7, 8, 9, 40, 97, 384]),
    st.integers(2, 150),
    st.integers(1, 70),
    st.floats(0.1, 1),
)
def test_pairs_are_those_of_the_integers(tmp_path_factory, seed, width, count, targets, threshold):
    """The C code finds what the formula says, whatever does not fill its vectors, and exactly that."""
    rows = vectors_of(count, width, seed)
    codes = coded(rows, False, tmp_path_factory.mktemp("codes"), Resources())
    generator = np.random.default_rng(seed)
    asked, answering = generator.integers(count, size=53), generator.integers(count, size=targets)
    integers = codes.codes_NW.astype(np.int64) - 63
    inverse = codes.inverse_N.astype(np.float64)
    one, other = inverse[asked][:, None], inverse[answering]
    beyond = integers[asked] @ integers[answering].T - (threshold * one * other - codes.slack * (one + other))
    found = np.zeros(beyond.shape, bool)
    found[tuple(pairs_of(codes, asked, answering, threshold).T)] = True
    certain = np.abs(beyond) > 1e-5 * one * other  # limits are in float32
    assert (found == (beyond >= 0))[certain].all()
    for slower in (1, 2):  # than the fastest that this processor has
        plain = np.zeros(beyond.shape, bool)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "near_rows", lambda *given, slower=slower: near_rows(*given, slower))
            plain[tuple(pairs_of(codes, asked, answering, threshold).T)] = True
        assert (plain == found).all()


@pytest.mark.parametrize("width", [2, 33, 97, 512])
@pytest.mark.parametrize("is_exact", [False, True])
def test_no_near_pair_is_lost_and_few_others_are_found(width, is_exact, tmp_path):
    rows = vectors_of(1500, width, 0)
    unit = rows.between(0, 1500)
    codes = coded(rows, is_exact, tmp_path, Resources())
    found = np.zeros((1500, 1500), bool)
    found[tuple(pairs_of(codes, np.arange(1500), np.arange(1500), 0.8).T)] = True
    cosines = unit @ unit.T
    assert found[cosines >= 0.8].all()
    if not is_exact:
        assert not found[cosines < 0.72].any()


def test_a_bound_holds_for_the_worst_vectors(tmp_path):
    """Values that are all rounded by half, in the same direction as the other vector."""
    turned = np.full((2, 64), 20.5, np.float32)
    turned[:, 0] = 63
    unit = turned / np.linalg.norm(turned, axis=1, keepdims=True)
    integers, inverse = codes_of(unit, np.eye(64, dtype=np.float32))
    slack = coded(Rows(unit), True, tmp_path, Resources()).slack
    codes = module.Codes(integers, inverse, slack)
    assert len(pairs_of(codes, np.array([0]), np.array([1]), 1.0)) == 1


def test_a_row_of_zeros_is_near_to_none(tmp_path):
    codes = coded(vectors_of(50, 24, 1), False, tmp_path, Resources())
    assert codes.inverse_N[0] == NOTHING and (codes.codes_NW[0] == 63).all()
    assert not len(pairs_of(codes, np.array([0]), np.arange(50), 0.1))


def test_more_pairs_than_there_is_room_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ROOM", 1100)
    monkeypatch.setattr(module, "TARGETS", 64)
    rows = Rows(np.ones((333, 16), np.float32))
    codes = coded(rows, False, tmp_path, Resources())
    found = pairs_of(codes, np.arange(333), np.arange(100), 0.99)
    assert len({tuple(pair) for pair in found.tolist()}) == len(found) == 33300


def test_of_thousands_of_copies_the_sample_takes_some(tmp_path, monkeypatch):
    """All pairs of all its queries would be gigabytes where half of a million images are copies of one."""
    monkeypatch.setattr(module, "ROOM", 8192)
    monkeypatch.setattr(coded_cells, "FEW", 9000)
    rows = Rows(np.ones((9000, 16), np.float32))
    codes = coded(rows, False, tmp_path, Resources())
    centroids = coded_cells.find_centroids(rows, 0.9, tmp_path, Resources())
    cells = coded_cells.lay_out(rows, codes, centroids, False, tmp_path, Resources())
    place, row, _ = margin._pairs_above(rows, cells, np.arange(512), 0.9, Resources())
    counts = np.bincount(place, minlength=512)
    assert (counts >= margin.PAIRS_OF_A_QUERY).all() and (counts < margin.PAIRS_OF_A_QUERY + 16).all()
    assert (row != place).all()


def test_what_does_not_fit_is_refused():
    codes, room = np.zeros((4, 16), np.uint8), np.zeros(64, np.int32)
    one, beyond, number = np.zeros(1, np.int64), np.array([4]), np.ones(1, np.float32)
    many, numbers = np.arange(4).repeat(9), np.ones(36, np.float32)

    def called(width=16, asked=codes, rows=one, slope=number, first=0, targets=one, scale=number):
        return near_rows(
            width, asked, rows, slope, slope, first, codes, targets, scale, scale, room, room.copy()
        )

    assert called()[1] == 1
    for wrong in (
        {"rows": beyond},
        {"targets": -beyond},
        {"width": 12},
        {"asked": codes[:3, :12].copy()},
        {"targets": many, "scale": numbers},
        {"targets": many[:2]},
        {"slope": numbers},
        {"first": -1},
    ):
        with pytest.raises(ValueError, match="do not fit"):
            called(**wrong)
