"""Labels through frames: against loops over all patches, and stopped and gone on with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.dense.discs import moving
from unlabeled import UserError, VisionTransformer
from unlabeled.dense import propagate_data as module
from unlabeled.dense.masks import labels_of
from unlabeled.dense.propagate import Directions, Labelled, Propagation, normalised, propagated
from unlabeled.dense.propagate_data import propagate_data
from unlabeled.dense.regions import region_similarity
from unlabeled.dense.video import Frames, write_video


def looped(
    features: np.ndarray, context: list[Labelled], top: int, most: int, temperature: float
) -> np.ndarray:
    h, w, _ = features.shape
    result = np.zeros((len(context[0].labels), h, w))
    for row in range(h):
        for column in range(w):
            near = []
            for frame in context:
                for y in range(h):
                    for x in range(w):
                        if abs(y - row) <= most and abs(x - column) <= most:
                            cosine = float(features[row, column].astype(np.float64) @ frame.features[y, x])
                            near.append((cosine, frame.labels[:, y, x]))
            best = sorted(near, key=lambda pair: -pair[0])[:top]
            weights = np.exp(np.array([cosine for cosine, _ in best]) / temperature)
            for weight, (_, labels) in zip(weights / weights.sum(), best, strict=True):
                result[:, row, column] += weight * labels
    return result


def frame(rng: np.random.Generator, h: int, w: int, classes: int = 3) -> Labelled:
    features = rng.normal(size=(h, w, 5))
    features /= np.linalg.norm(features, axis=2, keepdims=True)
    return Labelled(features.astype(np.float32), rng.random((classes, h, w)).astype(np.float32))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 99), st.integers(1, 11), st.integers(1, 11), st.integers(1, 3), st.integers(1, 7),
    st.integers(0, 12),
)  # fmt: skip
def test_propagation_is_that_of_loops_over_all_patches(
    seed: int, h: int, w: int, frames: int, top: int, most: int
) -> None:
    rng = np.random.default_rng(seed)
    context = [frame(rng, h, w) for _ in range(frames)]
    target = frame(rng, h, w).features
    np.testing.assert_allclose(
        propagated(target, context, top, most, 0.1), looped(target, context, top, most, 0.1), atol=1e-5
    )


def test_a_grid_of_several_tiles() -> None:
    rng = np.random.default_rng(0)
    context = [frame(rng, 19, 18)]
    target = frame(rng, 19, 18).features
    np.testing.assert_allclose(
        propagated(target, context, 5, 3, 0.1), looped(target, context, 5, 3, 0.1), atol=1e-5
    )


def test_the_first_and_the_last_frames_are_remembered() -> None:
    rng = np.random.default_rng(0)
    propagation = Propagation(memory=2, top=3, neighbourhood=2, temperature=0.1)
    first = propagation.begin(frame(rng, 4, 5))
    seen = [first]
    for _ in range(5):
        features = frame(rng, 4, 5).features
        expected = looped(features, [first, *seen[1:][-2:]], 3, 2, 0.1)
        seen.append(propagation.next(features))
        np.testing.assert_allclose(seen[-1].labels, expected, atol=1e-5)


def test_what_all_patches_share_does_not_count_and_the_reach_follows_the_grid() -> None:
    """A backbone whose patches differ by little: as they are, everything is as near as everything."""
    rng = np.random.default_rng(0)
    own = rng.normal(size=(10, 16, 6)).astype(np.float32)
    features = np.float32([50, 0, 0, 0, 0, 0]) + own
    first = rng.random((2, 10, 16)).astype(np.float32)
    directions = Directions.of(features)
    unit = directions(features)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=-1), 1, atol=1e-5)
    assert unit.reshape(-1, 6).mean(0) == pytest.approx(np.zeros(6), abs=0.1)
    propagation = Propagation(top=1)
    propagation.begin(Labelled(unit, first))
    for moved in (1, 2):  # columns; a fifth of 10 rows
        again = propagation.next(directions(np.roll(features, moved, axis=1))).labels
        np.testing.assert_array_equal(again[:, :, moved:], first[:, :, :-moved])
        propagation.last.clear()
    too_far = propagation.next(directions(np.roll(features, 3, axis=1))).labels
    assert (too_far[:, :, 3:] != first[:, :, :-3]).all()
    flat = Directions.of(np.ones((3, 3, 4), np.float32))
    np.testing.assert_array_equal(flat(np.ones((3, 3, 4), np.float32)), 0)


def test_a_map_is_spread_from_0_to_1_unless_nothing_is_in_it() -> None:
    np.testing.assert_allclose(
        normalised(np.array([[0.2, 0.3], [0.4, 0.2]], np.float32)), [[0, 0.5], [1, 0]], atol=1e-6
    )
    for flat in (np.zeros((2, 2), np.float32), np.full((2, 2), 0.3, np.float32)):
        np.testing.assert_array_equal(normalised(flat), flat)


@pytest.fixture
def first_labels() -> object:
    inside = moving(1)[0][1]
    return labels_of([inside], [inside.shape], ["the first frame"])


@pytest.mark.parametrize(
    "options", [{}, {"whiten": False, "temperature": 0.1, "neighbourhood": 12}], ids=["ours", "protocol"]
)
def test_a_moving_disc_is_followed(
    workshop: Path, tmp_path: Path, local_model: VisionTransformer, first_labels: object, options: dict
) -> None:
    out = tmp_path / "out"
    frames = Frames(workshop / "frames")
    result = propagate_data(local_model, frames, first_labels, out, size=96, device="cpu", **options)
    assert result["targets"] == 9 and result["bad_files"] == 0
    for number, (_, truth) in enumerate(moving(9)):
        found = np.asarray(Image.open(tmp_path / "out" / "masks" / f"{number:02}.png"))
        assert region_similarity(found == 255, truth) > 0.85
    assert result["pixels"]["object"] + result["pixels"]["background"] == 9 * 96 * 128
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "masks", "overlay.mp4", "segment.json", "segment.png",
    ]  # fmt: skip


def test_a_run_that_was_stopped_goes_on_the_same(
    workshop: Path,
    tmp_path: Path,
    local_model: VisionTransformer,
    first_labels: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    frames = tmp_path / "frames"
    shutil.copytree(workshop / "frames", frames)
    (frames / "03b.png").write_bytes(b"broken")
    Image.fromarray(moving(1)[0][0][:90]).save(frames / "05b.png")
    options = {"size": 48, "memory": 2, "device": "cpu"}
    whole = propagate_data(local_model, Frames(frames), first_labels, tmp_path / "whole", **options)
    assert (whole["targets"], whole["bad_files"]) == (9, 2)

    save = module.save_image
    for stop_at in (0, 5):
        out = tmp_path / f"stopped{stop_at}"

        def stopping(pixels: np.ndarray, path: Path, place: str = f"{stop_at:02}.png") -> None:
            if path.name == place:
                raise KeyboardInterrupt
            save(pixels, path)

        with monkeypatch.context() as patch:
            patch.setattr(module, "save_image", stopping)
            with pytest.raises(KeyboardInterrupt):
                propagate_data(local_model, Frames(frames), first_labels, out, **options)
        assert len(list((out / "state").iterdir())) <= 5
        again = propagate_data(local_model, Frames(frames), first_labels, out, **options)
        assert {**again, "out": 0, "video": 0, "picture": 0} == {**whole, "out": 0, "video": 0, "picture": 0}
        for path in (tmp_path / "whole" / "masks").iterdir():
            assert path.read_bytes() == (out / "masks" / path.name).read_bytes()
    with pytest.raises(UserError, match=r"other settings \(propagation differ\)"):
        propagate_data(local_model, Frames(frames), first_labels, out, **options, top=3)
    (out / "masks" / "05.png").unlink()
    with pytest.raises(UserError, match="cannot be gone on with"):
        propagate_data(local_model, Frames(frames), first_labels, out, **options)


@pytest.mark.parametrize("kind", ["mp4", "avi", "gif"])
def test_videos_are_read(tmp_path: Path, kind: str) -> None:
    pictures = [pixels for pixels, _ in moving(5)]
    path = tmp_path / f"clip.{kind}"
    if kind == "gif":
        Image.fromarray(pictures[0]).save(
            path, save_all=True, append_images=[Image.fromarray(one) for one in pictures[1:]], duration=100
        )
    else:
        write_video(tmp_path / "clip.mp4", iter(pictures), 25)
        if kind == "avi":
            import cv2

            writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 25, (128, 96))
            for one in pictures:
                writer.write(one[:, :, ::-1])
            writer.release()
    frames = Frames(path)
    found = list(frames)
    assert [one.key for one in found] == [f"{number:06}" for number in range(5)]
    for one, expected in zip(found, pictures, strict=True):
        assert np.abs(one.pixels.astype(float) - expected).mean() < 12
    assert [one.key for one in frames] == [one.key for one in found]


def test_a_video_of_odd_sides_and_of_nothing(tmp_path: Path) -> None:
    write_video(tmp_path / "odd.mp4", iter([np.zeros((33, 41, 3), np.uint8)] * 3), 10)
    assert [one.pixels.shape for one in Frames(tmp_path / "odd.mp4")] == [(32, 40, 3)] * 3
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"bad\.mp4 cannot be read as a video"):
        list(Frames(tmp_path / "bad.mp4"))
    with pytest.raises(UserError, match=r"no video at .*missing\.mp4"):
        Frames(tmp_path / "missing.mp4")
